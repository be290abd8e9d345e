"""How a run makes its basis from reference gradients, or restores it from a checkpoint."""

import math
from typing import Any

import torch

from ..engines import Engine
from ..geometry import Geometry, assign_groups, orthonormalise_
from ..options import Settings
from ..reference import ReferencePasses
from ..storage import Read
from ..subspace import Subspace, read_geometry
from .placement import choose_basis_device, choose_basis_dtype, settle_placement


class GradientBasis:
    """Makes the basis of scope `parameter` or `global`: an orthonormal basis of the span of reference gradients.

    Attributes:
        parts: reference gradients for each set.
        rank: the most directions of a group.
        num_bytes: what the basis takes in this process.
        device: where it is.
        sharded: whether each process has a piece of it.
        unreached: none; see `InputBasis`.
    """

    unreached = frozenset()

    def __init__(self, settings: Settings, num_sets: int, engine: Engine) -> None:
        """Decide where the basis goes; every process calls it."""
        self._settings = settings
        self._engine = engine
        self.rank = settings.rank or num_sets
        self.parts = math.ceil(self.rank / num_sets)
        self.dtype = choose_basis_dtype(settings.basis_dtype, engine)
        self.num_bytes = num_sets * self.parts * sum(engine.sizes) * self.dtype.itemsize
        device = choose_basis_device(settings.basis_device, engine.device, self.num_bytes)
        self.device, self.kernel = settle_placement(engine, device, settings.kernel)
        self.sharded = engine.processes.sharded
        self._groups = assign_groups(len(engine.names), settings.scope)

    @property
    def _pinned(self) -> bool:
        """Whether the basis is in host memory that an accelerator copies from."""
        return self.device.type == "cpu" and self._engine.device.type != "cpu"

    def _allocate(self, num_rows: int) -> list[torch.Tensor]:
        """Allocate the memory of a basis, `[num_rows, size_i]` a parameter."""
        return [
            torch.empty(num_rows, size, dtype=self.dtype, device=self.device, pin_memory=self._pinned)
            for size in self._engine.sizes
        ]

    def compute(self, passes: ReferencePasses) -> tuple[Subspace, dict[str, float]]:
        """Compute the reference gradients at the current weights, and a basis of them in their memory.

        The last basis must have been dropped before: the new rows take its memory.

        Returns:
            the subspace, and the reference losses by the name of the set.
        """
        engine = self._engine
        if self._pinned and engine.device.type == "cuda":
            # PyTorch reuses freed pinned memory only after an event that it queues when the memory is freed. Without
            # waiting for it, memory for the rows would be pinned a second time.
            torch.cuda.synchronize(engine.device)
        rows = self._allocate(len(passes.sets) * self.parts)
        losses = passes.gradients_into(rows)
        with torch.no_grad():
            basis, geometry = orthonormalise_(
                rows, self._groups, self._settings.rank, engine.device, self.parts, engine.processes
            )
        return self._wrap(basis, geometry), losses

    def restore(self, read: Read, names: set[str]) -> Subspace:
        """Make the basis from a checkpoint's tensors.

        Raises:
            ValueError: they are not this run's; the message continues the file's name.
        """
        geometry = read_geometry(read)
        foreign = {name for name in names if name.startswith("basis.")} - {f"basis.{n}" for n in self._engine.names}
        if foreign:
            raise ValueError(f"has {min(foreign)!r}, a parameter that this run does not train")
        basis = self._allocate(geometry.whitening.shape[-1])
        for name, rows in zip(self._engine.names, basis, strict=True):
            stored = read(f"basis.{name}")
            if stored.shape != rows.shape:
                raise ValueError(f"has {stored.shape[-1]} elements for {name}, this run {rows.shape[-1]}")
            rows.copy_(stored)
        return self._wrap(basis, geometry)

    def _wrap(self, basis: list[torch.Tensor], geometry: Geometry) -> Subspace:
        engine = self._engine
        subspace = Subspace(engine.names, basis, geometry, self._groups, engine.device, engine.processes)
        subspace.plan(self.kernel).warmup(engine.dtypes)
        return subspace

    def made_by(self) -> dict[str, Any]:
        """Return the options that must be the same for a basis in a checkpoint to be used."""
        return {
            "ogpsa_rank": self.rank,
            "ogpsa_scope": self._settings.scope,
            "ogpsa_basis_dtype": str(self.dtype).removeprefix("torch."),
        }
