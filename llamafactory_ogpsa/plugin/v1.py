"""The seam `llamafactory.v1.config.arg_parser`: LLaMA-Factory's next trainer (`USE_V1=1`) refuses OGPSA by name.

It has no OGPSA, and with `ALLOW_EXTRA_KEYS=1` it would ignore the options and train without it.
"""

import functools
import sys
from types import ModuleType
from typing import Any

from .backends import given_options, ogpsa_options


def patch(module: ModuleType) -> None:
    """Wrap the function that parses the arguments of every v1 command.

    Args:
        module: the executed `llamafactory.v1.config.arg_parser`.

    Raises:
        AttributeError: the module has no `get_args`; it is left as it was.
    """
    get_args = module.get_args

    @functools.wraps(get_args)
    def checked_get_args(args=None):
        asking = ogpsa_options(read_arguments() if args is None else args)
        if asking:
            names = ", ".join(f"`{name}`" for name in asking)
            raise ValueError(
                f"{names} {'is' if len(asking) == 1 else 'are'} given, but LLaMA-Factory's v1 trainer has no OGPSA; "
                f"allowed: `USE_V1` unset, or a run without {'it' if len(asking) == 1 else 'them'}."
            )
        return get_args(args)

    module.get_args = checked_get_args


def read_arguments() -> dict[str, Any]:
    """Read the options from the command line and the file that it names, as v1's parser does."""
    from omegaconf import OmegaConf

    words = sys.argv[1:]
    if not words or not words[0].endswith((".yaml", ".yml", ".json")):
        return dict(given_options(words))
    return {**OmegaConf.to_container(OmegaConf.load(words[0])), **dict(given_options(words[1:]))}
