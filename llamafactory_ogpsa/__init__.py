"""OGPSA: safety post-training of language models without the alignment tax (arXiv 2602.07892).

Importing this package costs nothing: `Subspace`, the Python interface, is loaded when it is first used, because the
package is imported by every `import torch` through its entry point (see `autoload`).
"""

__version__ = "0.1.0"

# For error messages: the LLaMA-Factory releases in scripts/matrix.py, and the main branch that it got by --source.
TESTED_WITH = "0.9.4, 0.9.5, or 0.9.6.dev0 (its main branch of August 2026)"
__all__ = ["Subspace"]


def __getattr__(name: str):
    if name == "Subspace":
        from .subspace import Subspace

        return Subspace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
