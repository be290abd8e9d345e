"""One training run with OGPSA, independent of the trainer: refresh, projection, figures, log and checkpoints."""

from .host import Host
from .run import OgpsaRun


__all__ = ["Host", "OgpsaRun"]
