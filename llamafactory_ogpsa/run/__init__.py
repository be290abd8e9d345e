"""One training run with OGPSA, independent of the trainer: refresh, projection, figures, log and checkpoints."""

from .run import Host, OgpsaRun


__all__ = ["Host", "OgpsaRun"]
