"""The entry point that `import torch` calls, and the import hook it installs.

PyTorch calls every entry point of the group `torch.backends` at the end of `import torch`. That is the one place that
the stock `llamafactory-cli`, its torchrun workers and the web UI's subprocesses all pass. `register` only adds a
finder to `sys.meta_path`; the rest of this package is imported when LLaMA-Factory's own modules are. It therefore uses
the standard library alone, and it never raises: a broken installation must not break `import torch`.
"""

import importlib
import importlib.abc
import sys
import threading


_PLUGIN = "llamafactory_ogpsa.plugin"

# Only leaf modules: under torchrun, `llamafactory.train.tuner` is already being executed when torch is first imported.
SEAMS = {
    "llamafactory.hparams.parser": f"{_PLUGIN}.parser",
    "llamafactory.train.pt.workflow": f"{_PLUGIN}.workflow",
    "llamafactory.train.sft.workflow": f"{_PLUGIN}.workflow",
    "llamafactory.train.rm.workflow": f"{_PLUGIN}.workflow",
    "llamafactory.train.dpo.workflow": f"{_PLUGIN}.workflow",
    "llamafactory.train.kto.workflow": f"{_PLUGIN}.workflow",
    "llamafactory.webui.interface": f"{_PLUGIN}.board",
}


def apply_patch(module) -> None:
    """Let the plugin patch a LLaMA-Factory module that has just been executed.

    A failure is told and swallowed: a stock run goes on, and a run that asks for OGPSA is stopped later, because
    `plugin.parser` looks whether the seams it needs are in place.
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
        """Return the spec that the other finders give, its loader patching the module after execution."""
        if name not in SEAMS or getattr(self._active, "name", None) == name:
            return None

        # Another plugin's finder may ask all finders too, this one included: without the mark both would recurse.
        self._active.name = name
        try:
            for finder in sys.meta_path:
                find_spec = getattr(finder, "find_spec", None)
                spec = find_spec(name, path, target) if find_spec is not None and finder is not self else None
                if spec is not None:
                    break
            else:
                return None
        finally:
            self._active.name = None

        execute = getattr(spec.loader, "exec_module", None)
        if execute is not None:

            def exec_module(module):
                execute(module)
                if module.__name__ == name:
                    apply_patch(module)

            spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Install the import hook, once. Called by `import torch`; never raises."""
    try:
        if any(isinstance(finder, SeamFinder) for finder in sys.meta_path):
            return

        sys.meta_path.insert(0, SeamFinder())
        for name in SEAMS:
            if name in sys.modules:
                apply_patch(sys.modules[name])
    except Exception as err:
        print(f"llamafactory-ogpsa: OGPSA is not available: {err}", file=sys.stderr)
