"""Checks of gradients that are given by name."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .kernels.plan import GRADIENT_DTYPES


def check_mapping(what: str, gradients: Any) -> None:
    """Raise a TypeError unless this is a dict."""
    if not isinstance(gradients, Mapping):
        raise TypeError(f"{what} must be a dict of tensors by parameter name, not {type(gradients).__name__}")


def check_tensors(what: str, gradients: Any, dtypes: Sequence[torch.dtype] | None = None) -> None:
    """Raise a TypeError unless this is a dict of dense tensors, or Nones, of these dtypes (None: any floating one)."""
    check_mapping(what, gradients)
    allowed = "a real floating dtype" if dtypes is None else "float32, bfloat16 or float16"
    for name, tensor in gradients.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{what} has {type(tensor).__name__} for {name}; allowed: a tensor or None")
        if tensor.layout != torch.strided:
            raise TypeError(f"{what} has a tensor of layout {tensor.layout} for {name}; allowed: a dense one")
        if not tensor.dtype.is_floating_point if dtypes is None else tensor.dtype not in dtypes:
            raise TypeError(f"{what} has {tensor.dtype} for {name}; allowed: {allowed}")


def check_references(gradients: Any) -> list[str]:
    """Check reference gradients, a list of dicts with the same names and shapes, and return their names.

    Raises:
        TypeError: `gradients` is something else.
        ValueError: there is none, or their names or shapes differ.
        FloatingPointError: one is not finite; names it.
    """
    if isinstance(gradients, Mapping) or not isinstance(gradients, Sequence):
        raise TypeError(
            "`gradients` must be a list of dicts of tensors, one dict a reference gradient, "
            f"not {type(gradients).__name__}"
        )
    for index, gradient in enumerate(gradients):
        check_tensors(f"`gradients[{index}]`", gradient)
    if not gradients or not gradients[0]:
        raise ValueError("`gradients` must hold at least one dict of tensors")

    names = list(gradients[0])
    for index, other in enumerate(gradients):
        if list(other) != names:
            differing = [name for name in [*names, *other] if (name in names) != (name in other)]
            raise ValueError(
                "`gradients` must all have the same names in the same order; those of `gradients[0]` and "
                f"`gradients[{index}]` differ in {some(differing) if differing else 'their order'}"
            )
    for name in names:
        shapes = {tuple(gradient[name].shape) for gradient in gradients if gradient[name] is not None}
        if len(shapes) > 1:
            listed = ", ".join(sorted(str(list(shape)) for shape in shapes))
            raise ValueError(f"`gradients` have different shapes for {name}: {listed}")
        for index, gradient in enumerate(gradients):
            if gradient[name] is not None and not gradient[name].isfinite().all():
                raise FloatingPointError(f"`gradients[{index}]` is not finite, the first time in {name}")
    if all(gradient[name] is None for gradient in gradients for name in names):
        raise ValueError("`gradients` hold no tensor at all")
    return names


def order_gradients(gradients: Any, names: Sequence[str], sizes: Sequence[int]) -> list[torch.Tensor | None]:
    """Check gradients to be projected and return them in the order of a subspace's names.

    `sizes`: the number of elements of each name.

    Raises:
        TypeError: not a dict, or a tensor that is sparse or not of one of `GRADIENT_DTYPES`.
        ValueError: a name of the subspace is missing, or has another number of elements.
    """
    check_mapping("`gradients`", gradients)
    known = {name: gradients[name] for name in names if name in gradients}
    if not known:
        # Names with a wrapper's prefix would otherwise turn the projection off silently.
        raise ValueError(f"`gradients` has none of the subspace's names: {some(names)}; it has {some(gradients)}")
    check_tensors("`gradients`", known, GRADIENT_DTYPES)
    for name, size in zip(names, sizes, strict=True):
        gradient = gradients.get(name)
        if gradient is not None and gradient.numel() != size:
            raise ValueError(f"the gradient of {name} has {gradient.numel()} elements, its reference gradient {size}")
    missing = [name for name in names if name not in gradients]
    if missing:
        raise ValueError(
            f"`gradients` lacks {some(missing)}; allowed: every name of the subspace, with None where a parameter has "
            "no gradient"
        )
    return [gradients[name] for name in names]


def some(names: Iterable[str]) -> str:
    """List names, the first three if there are more."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
