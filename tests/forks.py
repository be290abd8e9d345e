"""Fresh processes without the ten seconds of imports: forks of a server that has imported everything once."""

import multiprocessing
import os
import sys
from multiprocessing.connection import wait
from typing import NamedTuple

import pytest
from conftest import free_port


# What runs import, late as well. Nothing here may start a thread of PyTorch's or touch a GPU.
PRELOAD = [
    "pytest",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "llamafactory.train.tuner",
    "llamafactory_ogpsa.plugin.trainer",
    "transformers.models.qwen2.modeling_qwen2",
    "peft",
    "deepspeed",
]


class Finished(NamedTuple):
    """Exit codes by rank, None for a process that was killed because another failed; and what they printed."""

    codes: list
    output: str


def _start(log, env, work, arguments):
    """Be a process of one run: print into its log and work."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    os.environ.update(env)
    work(*arguments)


def fork(folder, work, *arguments, processes=1, env=()):
    """Run a function of a module in processes of their own, as torchrun would; end all when one fails.

    Args:
        folder: Where what they print is written.
        work: The function; it is imported by its name.
        arguments: Its arguments.
        processes: How many. More than one find each other by torchrun's environment variables.
        env: Further environment variables.

    Returns:
        A `Finished`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    envs = [dict(env) for _ in range(processes)]
    if processes > 1:
        together = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        envs = [{**env, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank, env in enumerate(envs)]
    logs = [os.path.join(folder, f"rank-{rank}.log") for rank in range(processes)]
    started = [
        context.Process(target=_start, args=(log, env, work, arguments), daemon=True)
        for log, env in zip(logs, envs, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported, by the server that the first starts
        for process in started:
            process.start()
    try:
        going, killed = {process.sentinel: process for process in started}, []
        while going:
            for sentinel in wait(list(going)):
                process = going.pop(sentinel)
                process.join()
                if process.exitcode != 0:
                    for other in going.values():
                        if other.exitcode is None and other not in killed:
                            other.kill()
                            killed.append(other)
    finally:
        for process in started:
            process.kill()
            process.join()
    output = "".join(open(log, encoding="utf-8", errors="replace").read() for log in logs if os.path.exists(log))
    return Finished([None if process in killed else process.exitcode for process in started], output)


def run_forked(folder, work, *arguments, **options):
    """Do the same; fail the test with what was printed where a process failed. Return what was printed."""
    finished = fork(folder, work, *arguments, **options)
    assert not any(finished.codes), f"exit codes {finished.codes}\n{finished.output[-8000:]}"
    return finished.output
