"""The entry point and the import hook: cheap, silent, harmless."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from conftest import cli


def python(code, **env):
    """Run Python code in a fresh interpreter; return what it prints last, as JSON."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_importing_torch_installs_the_hook_and_imports_nothing_else():
    modules = python("""
        import json, sys, torch
        finders = [type(f).__name__ for f in sys.meta_path]
        print(json.dumps([finders.count("SeamFinder"), sorted(m for m in sys.modules if m.startswith("llamafactory"))]))
    """)
    assert modules == [1, ["llamafactory_ogpsa", "llamafactory_ogpsa.autoload"]]


def test_autoloading_can_be_switched_off_and_the_module_still_runs(tmp_path):
    present = python(
        "import json, sys, torch; print(json.dumps('llamafactory_ogpsa' in sys.modules))",
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert present is False
    env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    for module, known in [("llamafactory.cli", False), ("llamafactory_ogpsa", True)]:
        process = subprocess.run(
            [sys.executable, "-m", module, "train", "--help"], capture_output=True, text=True, env=env
        )
        assert ("--ogpsa_dataset" in process.stdout) is known


def test_the_hook_uses_the_standard_library_alone():
    foreign = python("""
        import json, sys
        before = set(sys.modules)
        import llamafactory_ogpsa.autoload as autoload
        autoload.register()
        added = {name.split(".")[0] for name in set(sys.modules) - before}
        print(json.dumps(sorted(added - set(sys.stdlib_module_names))))
    """)
    assert foreign == ["llamafactory_ogpsa"]


def test_a_plugin_that_fails_breaks_neither_torch_nor_a_stock_run():
    enabled, error = python("""
        import contextlib, io, json, sys
        import torch
        from llamafactory_ogpsa import autoload
        autoload.SEAMS["llamafactory.hparams.parser"] = "llamafactory_ogpsa.nowhere"
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            from llamafactory.hparams import FinetuningArguments
            from llamafactory.hparams.parser import _TRAIN_ARGS
        print(json.dumps([FinetuningArguments not in _TRAIN_ARGS, errors.getvalue()]))
    """)
    assert enabled is False
    assert "OGPSA is not available, llamafactory.hparams.parser" in error


def test_two_hooks_on_the_same_module_live_together():
    for first in ("ours", "theirs"):
        applied = python(f"""
            import importlib.abc, json, sys
            from llamafactory_ogpsa.autoload import register

            applied = []

            class Other(importlib.abc.MetaPathFinder):
                def find_spec(self, name, path=None, target=None):
                    if name != "llamafactory.hparams.parser" or applied:
                        return None
                    applied.append("asked")
                    specs = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)
                    spec = next(spec for spec in specs if spec is not None)
                    execute = spec.loader.exec_module
                    spec.loader.exec_module = lambda module: (execute(module), applied.append("patched"))[0]
                    return spec

            register() if {first == "ours"} else None
            sys.meta_path.insert(0, Other())
            import torch
            register()
            from llamafactory.hparams import FinetuningArguments
            from llamafactory.hparams.parser import _TRAIN_ARGS
            print(json.dumps([applied, FinetuningArguments not in _TRAIN_ARGS]))
        """)
        assert applied == [["asked", "patched"], True]


@pytest.mark.cli
def test_an_unknown_layout_refuses_ogpsa_and_runs_stock(base_args, tmp_path):
    from conftest import OGPSA

    args = {**base_args, **OGPSA}
    code = f"""
        import json
        import torch
        import llamafactory.train.sft.workflow as workflow
        from llamafactory.train.tuner import run_exp

        get_dataset = workflow.get_dataset
        workflow.get_dataset = lambda *args: get_dataset(*args)
        try:
            run_exp({args!r})
        except RuntimeError as err:
            print(json.dumps(str(err)))
    """
    message = python(code)
    assert "OGPSA does not know LLaMA-Factory" in message
    assert "get_dataset has other parameters" in message
    assert "stock stages are not affected" in message


@pytest.mark.cli
@pytest.mark.parametrize(
    ("module", "replaced"),
    [
        ("llamafactory.train.sft.workflow", "run_sft"),
        ("llamafactory.webui.interface", "create_ui"),
        ("llamafactory.v1.config.arg_parser", "get_args"),
    ],
)
def test_a_module_whose_import_is_the_first_to_import_torch_is_patched_when_it_is_done(module, replaced):
    wrapped, spec, errors = python(f"""
        import contextlib, io, json
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            import {module} as module
        lines = [line for line in errors.getvalue().splitlines() if "OGPSA" in line]
        print(json.dumps([hasattr(module.{replaced}, "__wrapped__"), type(module.__spec__).__name__, lines]))
    """)
    assert wrapped
    assert spec == "ModuleSpec"
    assert errors == []


EXECUTING = """
    import json, sys, types
    from llamafactory_ogpsa import autoload

    patched = []
    plugin = types.ModuleType("plugin_of_the_test")
    plugin.patch = lambda module: patched.append([name for name in ("early", "late") if hasattr(module, name)])
    sys.modules["plugin_of_the_test"] = plugin
    autoload.SEAMS.clear()
    autoload.SEAMS["seam"] = "plugin_of_the_test"
    sys.path.insert(0, ".")
    try:
        import seam
    except RuntimeError:
        pass
    print(json.dumps([patched, autoload.SeamFinder in map(type, sys.meta_path)]))
"""


@pytest.mark.parametrize(
    ("end", "patched"), [("late = 1", [["early", "late"]]), ("raise RuntimeError", [])], ids=["done", "failed"]
)
def test_a_module_that_is_being_executed_is_patched_at_its_end_or_not_at_all(tmp_path, monkeypatch, end, patched):
    (tmp_path / "seam.py").write_text(f"early = 1\nimport llamafactory_ogpsa.autoload as a\na.register()\n{end}\n")
    monkeypatch.chdir(tmp_path)
    assert python(EXECUTING) == [patched, True]


@pytest.mark.cli
def test_the_version_command_is_not_touched():
    assert "OGPSA" not in cli("version").stdout
