"""What the processes of test_fsdp.py do."""

import accelerate.state
from conftest import run_here
from fsdp_on_cpu.accelerate_on_cpu import allow_fsdp


def train(args):
    allow_fsdp(accelerate.state)
    run_here(args)
