"""Lets `accelerate launch` use FSDP on a CPU: Python imports this at its start where its folder is on PYTHONPATH."""

import importlib.abc
import importlib.util
import os
import sys

from accelerate_on_cpu import allow_fsdp


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "accelerate.state":
            return None

        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), allow_fsdp(module))[0]
        return spec


if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    sys.meta_path.insert(0, Finder())
