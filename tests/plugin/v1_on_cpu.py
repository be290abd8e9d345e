"""LLaMA-Factory's v1 launcher, for several processes on a machine without an accelerator, where it would stop.

It synchronises with the accelerator after each step, and PyTorch raises where it is built for one and finds none.
"""

import torch


torch.accelerator.synchronize = lambda *args: None

from llamafactory.v1.launcher import main  # noqa: E402


main()
