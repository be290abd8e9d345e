"""Names of modules that are replaced for a while."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def replaced(modules: Sequence[ModuleType], names: dict[str, Any]) -> Iterator[None]:
    """Give names, where the modules have them, other values while the context is open."""
    with ExitStack() as stack:
        for module, name in itertools.product(modules, names):
            if hasattr(module, name):
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, names[name])
        yield
