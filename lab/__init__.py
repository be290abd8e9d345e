"""The alignment-tax lab and the demonstrations: an application of the package, beside it."""

from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
