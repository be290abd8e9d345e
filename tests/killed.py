"""Run LLaMA-Factory in a process of its own and die in it."""

import functools
import importlib
import os
import signal

import torch
from conftest import run_here


def die_in(target, number, kind):
    """Let the N-th call of a function (`module:name` or `module:class.name`) be the process's last act."""
    module, _, path = target.partition(":")
    owner, calls = importlib.import_module(module), 0
    *outer, name = path.split(".")
    for attribute in outer:
        owner = getattr(owner, attribute)
    function = getattr(owner, name)

    @functools.wraps(function)
    def counting(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            if kind == signal.SIGINT:  # which a shell lets its background jobs ignore
                signal.signal(kind, signal.default_int_handler)
            os.kill(os.getpid(), kind)
        return function(*args, **kwargs)

    setattr(owner, name, counting)


def train(args, *death):
    """Run LLaMA-Factory; with a signal's name, a target and N, the last process dies. Without, it is a run like any."""
    # DeepSpeed on a CPU asks for its checkpoints on the device `cpu:0`, which PyTorch does not know.
    torch.serialization.register_package(0, lambda _: None, lambda storage, at: storage if at == "cpu:0" else None)

    if death and int(os.getenv("RANK", "0")) == int(os.getenv("WORLD_SIZE", "1")) - 1:
        kind, target, number = death
        die_in(target, number, getattr(signal, kind))
    run_here(args)
