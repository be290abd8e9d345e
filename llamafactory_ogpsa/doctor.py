"""`llamafactory-ogpsa doctor`: can OGPSA train here, and if not, what to fix.

Each check is a function that yields what it finds. A problem is a finding, not an exception.
"""

import contextlib
import importlib
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from . import TESTED_WITH
from .autoload import SEAMS, is_hooked, register


OK, NOTE, FAIL = "ok", "note", "FAIL"

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
MODULE = "python -m llamafactory_ogpsa train ..."
REQUIRED = ("torch", "transformers", "llamafactory", "accelerate", "peft")
TORCH, PYPI_BUILD = "torch>=2.6,<2.15", "cu130"  # what PyPI's newest torch of these, and its torchaudio, are built for
CLONE = "in a clone of this project"  # because it is in no package index
OPTIONAL = {"deepspeed": "for YAMLs with `deepspeed:`", "triton": "for the kernels on a GPU"}


# The functions that OGPSA replaces by wrappers, outside the workflows.
REPLACED = {
    "llamafactory.hparams.parser": "get_train_args",
    "llamafactory.webui.interface": "create_ui",
    "llamafactory.v1.config.arg_parser": "get_args",
    "llamafactory.v1.trainers.sft_trainer": "run_sft",
}


@dataclass(frozen=True)
class Finding:
    """The result of a check; with `FAIL` OGPSA cannot train, with `NOTE` it can."""

    state: str
    subject: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        """Return the finding as it is printed."""
        line = f"{self.state:>4}  {self.subject}: {self.text}"
        return f"{line}\n      try: {self.fix}" if self.fix else line


def examine() -> int:
    """Print the findings of every check; return 0 if OGPSA can train, 1 otherwise."""
    failures = 0
    for check, module in CHECKS.items():
        # What keeps the module from being imported is told by another check.
        for finding in check() if module is None or not import_error(module) else ():
            failures += finding.state == FAIL
            print(finding, flush=True)
    print("OGPSA can train here." if failures == 0 else f"OGPSA cannot train here: fix what is marked {FAIL}.")
    return min(failures, 1)


def check_versions() -> Iterator[Finding]:
    """Is everything installed, and in which version?"""
    yield Finding(OK, "python", sys.version.split()[0])
    for name in (*REQUIRED, *OPTIONAL):
        try:
            yield Finding(OK, name, version(name))
        except PackageNotFoundError:
            if name in OPTIONAL:
                yield Finding(NOTE, name, f"not installed; needed {OPTIONAL[name]} only")
            else:
                yield Finding(FAIL, name, "not installed", f"pip install . {CLONE}")


def check_entry_point() -> Iterator[Finding]:
    """Is the entry point that `import torch` calls installed?"""
    expected = f"{register.__module__}:{register.__name__}"
    if any(point.value == expected for point in entry_points(group="torch.backends")):
        yield Finding(OK, "entry point", f"torch.backends has {expected}")
    else:
        text = f"torch.backends lacks {expected}, so `llamafactory-cli` does not know OGPSA"
        fix = f"pip install . {CLONE}, into this environment (a copy on PYTHONPATH is not enough)"
        yield Finding(FAIL, "entry point", text, f"{fix}, or train by `{MODULE}`")


def check_torch() -> Iterator[Finding]:
    """Can torch and the packages built on it, which LLaMA-Factory needs, be imported together?

    If torch and torchaudio are built for different CUDA versions, importing torchaudio fails, and so does every
    `llamafactory-cli train`. pip cannot prevent it, because their requirements do not name the CUDA version.
    """
    names = ("torch", "torchvision", "torchaudio")
    for name in names:
        error = import_error(name)
        if error:
            build = build_of("torchaudio") or build_of("torch")
            other = build not in (None, PYPI_BUILD)
            index = f" --index-url https://download.pytorch.org/whl/{build}" if other else ""
            fix = f"pip uninstall -y {' '.join(names)}, then pip install '{TORCH}' torchvision torchaudio{index}"
            yield Finding(FAIL, name, f"cannot be imported ({error})", fix)
            return
    yield Finding(OK, ", ".join(names), "can be imported together")


def build_of(package: str) -> str | None:
    """Return what a PyTorch wheel is built for (e.g. cu130), by the suffix of its version; None without a suffix."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    built = re.search(r"\+(cu\d+|rocm[\d.]+|cpu)\b", path.read_text()) if path is not None and path.is_file() else None
    return built[1] if built else None


def check_hook() -> Iterator[Finding]:
    """Did `import torch` install the import hook?"""
    if is_hooked():
        yield Finding(OK, "import hook", "installed by `import torch`")
    elif os.getenv(AUTOLOAD, "1") != "1":
        text = f"{AUTOLOAD}={os.environ[AUTOLOAD]} keeps `import torch` from installing it"
        yield Finding(FAIL, "import hook", text, f"unset {AUTOLOAD}, or train by `{MODULE}`")
    else:
        fix = "fix what is marked above; torch must be 2.6 or newer"
        yield Finding(FAIL, "import hook", "`import torch` did not install it", fix)


def check_backends() -> Iterator[Finding]:
    """Does an environment variable choose a backend or a trainer that has no OGPSA?"""
    from .plugin.backends import BACKENDS, is_set

    for variable, backend in BACKENDS.items():
        if is_set(variable):
            text = f"{variable}={os.environ[variable]} chooses LLaMA-Factory's {backend}, where OGPSA runs are refused"
            yield Finding(FAIL, "backend", text, f"unset {variable}")
    if is_set("USE_V1"):
        text = f"USE_V1={os.environ['USE_V1']} chooses LLaMA-Factory's v1 trainer, where OGPSA is experimental"
        yield Finding(NOTE, "backend", f"{text}: see docs/v1.md")


def check_seams() -> Iterator[Finding]:
    """Does every module of LLaMA-Factory that OGPSA patches look as expected, and is it patched?"""
    hooked = is_hooked()
    register()  # in case `import torch` did not: then this checks what would be patched
    for name in SEAMS:
        error = seam_error(name)
        if error is None:
            yield Finding(OK, name, "patched" if hooked else "would be patched by the import hook")
        elif name.startswith("llamafactory.webui"):
            yield Finding(NOTE, name, f"{error}; the web UI has no OGPSA here, training is not affected")
        elif name.startswith("llamafactory.v1"):
            unread = name.endswith(".arg_parser") and error.startswith("not patched")
            ignored = ", and with ALLOW_EXTRA_KEYS=1 its options are ignored" if unread else ""
            yield Finding(NOTE, name, f"{error}; OGPSA cannot train with USE_V1=1{ignored}")
        elif error.startswith("cannot be imported"):
            yield Finding(FAIL, name, error, f"fix what keeps `python -c 'import {name}'` from working")
        else:
            yield Finding(FAIL, name, error, f"install a LLaMA-Factory that OGPSA is tested with: {TESTED_WITH}")

    parser = sys.modules.get("llamafactory.hparams.parser")
    if parser is not None and not import_error("llamafactory_ogpsa.plugin.parser"):
        from .plugin.parser import other_parsers

        for name in other_parsers(parser):
            yield Finding(NOTE, "llamafactory.hparams.parser", f"OGPSA runs of another backend's {name} are refused")


def seam_error(name: str) -> str | None:
    """Import a module that OGPSA patches; return why it is not patched, None if it is."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        error = import_error(name)
    if error:
        return f"cannot be imported ({error})"

    # The hook prints the reason if it cannot patch a module.
    reason = re.search(f"OGPSA is not available, {name}: (.*)", printed.getvalue())
    if reason:
        return f"not patched ({reason[1]})"

    if name in REPLACED:
        wrapped = hasattr(getattr(sys.modules[name], REPLACED[name]), "__wrapped__")
        return None if wrapped else "not patched: it had been imported before the hook was installed"

    from .plugin.workflow import check_seam

    try:
        check_seam(name.split(".")[-2])
    except Exception as err:
        return str(err)
    return None


def check_devices() -> Iterator[Finding]:
    """What can be trained on?"""
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(OK, f"device {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        built = f", though torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
        yield Finding(NOTE, "device", f"CPU only{built}: enough for tiny models")


def check_triton() -> Iterator[Finding]:
    """Which kernels will project the gradients?"""
    import torch

    from .kernels import triton_obstacle

    accelerated = torch.cuda.is_available()
    obstacle = triton_obstacle("cuda" if accelerated else "cpu", interpret=False)
    text = f"torch, because {obstacle}" if obstacle else "Triton"
    if obstacle and accelerated:
        yield Finding(NOTE, "kernels", text, "pip install triton; install a C compiler; unset TRITON_INTERPRET")
    else:
        yield Finding(OK, "kernels", text)


def check_deepspeed() -> Iterator[Finding]:
    """If DeepSpeed is installed, can it be imported?"""
    if importlib.util.find_spec("deepspeed") is None:
        return

    error = import_error("deepspeed")
    if error:
        yield Finding(NOTE, "deepspeed", f"cannot be imported ({error})", "train without `deepspeed:` in the YAML")
        return

    from .engines.zero import find_problems

    problems = "; ".join(find_problems())
    if problems:
        yield Finding(NOTE, "deepspeed", f"OGPSA cannot use it: {problems}", f"pip install '.[deepspeed]' {CLONE}")
    else:
        yield Finding(OK, "deepspeed", "can be imported")


def import_error(name: str) -> str | None:
    """Import a module; return what it raises, None if nothing."""
    try:
        importlib.import_module(name)
    except Exception as err:
        return f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"
    return None


# In the order of the report, with the module that a check needs.
CHECKS: dict[Callable[[], Iterator[Finding]], str | None] = {
    check_versions: None,
    check_entry_point: None,
    check_torch: None,
    check_hook: None,
    check_backends: "llamafactory_ogpsa.plugin.backends",
    check_seams: None,
    check_devices: "torch",
    check_triton: "torch",
    check_deepspeed: None,
}
