"""The wheel: what is in it, and that installing it is all it takes."""

import os
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import OGPSA, read_rows, run_cli
from packaging.requirements import Requirement


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy of the sources that has nothing but them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "llamafactory_ogpsa"):
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*pip, "--wheel-dir", str(out), str(source)], check=True, env={**os.environ, "PYTHONNOUSERSITE": "1"}
    )
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_package_and_its_entry_point(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name for name in names if name.endswith("entry_points.txt"))
        entry_points = ConfigParser()
        entry_points.read_string(archive.read(info).decode())
        metadata = archive.read(info.replace("entry_points.txt", "METADATA")).decode()
    found = (path for path in (ROOT / "llamafactory_ogpsa").rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert {str(path.relative_to(ROOT)) for path in found} == {name for name in names if ".dist-info/" not in name}
    assert all(name.startswith("llamafactory_ogpsa") for name in names)  # nothing is left behind by an uninstallation
    assert dict(entry_points["torch.backends"]) == {"llamafactory_ogpsa": "llamafactory_ogpsa.autoload:register"}
    assert "Requires-Dist: llamafactory>=0.9.4" in metadata
    (torch,) = (
        line for line in metadata.splitlines() if re.match("Requires-Dist: torch[<>=]", line) and "extra" not in line
    )
    allowed = Requirement(torch.partition(": ")[2]).specifier
    # 2.15 is the first that is built for another CUDA than torchaudio 2.11.
    assert [version for version in ("2.5.1", "2.6.0", "2.11.0", "2.14.1", "2.15.0") if version in allowed] == [
        "2.6.0",
        "2.11.0",
        "2.14.1",
    ]


@pytest.mark.cli
def test_installing_the_wheel_is_all_it_takes(wheel, base_args, tmp_path, site_without_plugin):
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True)
    env = {"PYTHONPATH": f"{target}{os.pathsep}{site_without_plugin}"}
    run_cli({**base_args, **OGPSA}, tmp_path, env=env, python=("-S",))
    assert read_rows(base_args["output_dir"])[0]
