"""Scope `inputs`: what every weight matrix does to reference inputs is left as it is."""

from .protected import InputStats, Protected
from .record import Recorder
from .subspace import DEFAULT_RANK, MOST_DIRECTIONS, InputSubspace, most_directions


__all__ = [
    "DEFAULT_RANK",
    "MOST_DIRECTIONS",
    "InputStats",
    "InputSubspace",
    "Protected",
    "Recorder",
    "most_directions",
]
