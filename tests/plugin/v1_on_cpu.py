"""LLaMA-Factory's v1 launcher in processes without an accelerator."""

import sys

import torch


def train(config):
    """Run SFT on a YAML."""
    # It synchronises with the accelerator after each step: PyTorch raises where it is built for one and finds none.
    torch.accelerator.synchronize = lambda *args: None
    sys.argv = ["llamafactory-cli", "sft", config]
    from llamafactory.v1.launcher import main

    main()
