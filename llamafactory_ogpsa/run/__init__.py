"""One training run with OGPSA, whatever trains: when it refreshes, and what it projects, measures, logs and saves."""

from .run import Host, OgpsaRun


__all__ = ["Host", "OgpsaRun"]
