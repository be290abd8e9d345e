"""The alignment-tax lab; see `__main__.py`."""

import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "scripts"))  # the demo's data, model and scores
