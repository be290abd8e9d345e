"""The entry point that `import torch` calls, and the import hook it installs.

PyTorch calls every entry point of the group `torch.backends` at the end of `import torch`, which the stock
`llamafactory-cli`, its torchrun workers and the web UI's subprocesses all do. `register` only adds a finder to
`sys.meta_path`; the rest of this package is imported with LLaMA-Factory's own modules. This module uses only the
standard library and never raises: a broken installation must not break `import torch`.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import threading


# The training stages of LLaMA-Factory that OGPSA has.
STAGES = ("pt", "sft", "rm", "dpo", "kto")

_PLUGIN = "llamafactory_ogpsa.plugin"

# Only leaf modules: under torchrun, `llamafactory.train.tuner` is already being executed when torch is first imported.
SEAMS = {
    "llamafactory.hparams.parser": f"{_PLUGIN}.parser",
    **{f"llamafactory.train.{stage}.workflow": f"{_PLUGIN}.workflow" for stage in STAGES},
    "llamafactory.webui.interface": f"{_PLUGIN}.board",
    "llamafactory.v1.config.arg_parser": f"{_PLUGIN}.v1",
    "llamafactory.v1.trainers.sft_trainer": f"{_PLUGIN}.v1_trainer",
}


def apply_patch(module) -> None:
    """Let the plugin patch a LLaMA-Factory module that has just been executed.

    A failure is printed and not raised: stock runs are not affected, and `plugin.parser` stops a run that asks for
    OGPSA if the seams that it needs are not patched.
    """
    try:
        importlib.import_module(SEAMS[module.__name__]).patch(module)
    except Exception as err:
        print(f"llamafactory-ogpsa: OGPSA is not available, {module.__name__}: {err}", file=sys.stderr)


class SeamFinder(importlib.abc.MetaPathFinder):
    """Finds LLaMA-Factory's patched modules through the other finders and patches them once they are executed."""

    def __init__(self) -> None:
        self._active = threading.local()

    def find_spec(self, name, path=None, target=None):
        """Return the spec that the other finders give, with a loader that patches the module after its execution."""
        if name not in SEAMS or getattr(self._active, "name", None) == name:
            return None

        # All finders are asked, this one included, and another plugin's may do the same: else both would recurse.
        self._active.name = name
        try:
            finders = (finder for finder in sys.meta_path if hasattr(finder, "find_spec"))
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        finally:
            self._active.name = None

        execute = getattr(getattr(spec, "loader", None), "exec_module", None)
        if execute is not None:

            def exec_module(module):
                execute(module)
                if module.__name__ == name:
                    apply_patch(module)

            spec.loader.exec_module = exec_module
        return spec


class ExecutingSpec(importlib.machinery.ModuleSpec):
    """The spec of a module that was already being executed when the hook was installed; it patches it at the end.

    Python's import system clears `_initializing` when a module is complete, while it still holds the module's lock.
    Before that, only modules that it imports itself can have taken a name from it.
    """

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = importlib.machinery.ModuleSpec
            module = sys.modules.get(self.name)  # None if its execution failed
            if getattr(module, "__spec__", None) is self:
                apply_patch(module)


def patch_imported(module) -> None:
    """Patch a module that was imported before the hook was installed: now, or when its execution is done."""
    spec = getattr(module, "__spec__", None)
    if type(spec) is importlib.machinery.ModuleSpec and vars(spec).get("_initializing", False):
        spec.__class__ = ExecutingSpec
    else:
        apply_patch(module)


def is_hooked() -> bool:
    """Return whether the import hook is installed in this process."""
    return any(isinstance(finder, SeamFinder) for finder in sys.meta_path)


def register() -> None:
    """Install the import hook, once. Called by `import torch`; never raises."""
    try:
        if is_hooked():
            return

        sys.meta_path.insert(0, SeamFinder())
        for name in SEAMS:
            if name in sys.modules:
                patch_imported(sys.modules[name])
    except Exception as err:
        print(f"llamafactory-ogpsa: OGPSA is not available: {err}", file=sys.stderr)
