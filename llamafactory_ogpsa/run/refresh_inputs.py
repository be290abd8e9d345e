"""How a run makes the bases of scope `inputs`, and brings them back from a checkpoint."""

from typing import Any

import torch

from ..engines import Engine
from ..geometry import leading_directions
from ..inputs import DEFAULT_RANK, InputSubspace, Protected, Recorder, most_directions
from ..inputs.record import find_modules, is_transposed
from ..kernels.rows import TorchRows
from ..options import Settings
from ..reference import ReferencePasses
from ..storage import Read
from .placement import settle_placement


class InputBasis:
    """Makes a basis of the reference inputs of every weight matrix, from forward passes only.

    LoRA's output is `B A x`. If `B` is zero, as at the start, `A ← A − (A Vᵀ) V` changes nothing that the model does
    and keeps reference inputs out of the adapter from then on: `A`'s gradient is projected, so that `A x` stays zero
    for them, and `B` may be anything. After a further refresh this holds only for inputs that lie in the span of every
    refresh. If `B` is not zero (PiSSA, an adapter that is trained further), `A` is left as it is. `B` is protected by
    at most half the dimensions of its inputs `A x`, which are as many as the adapter's rank.

    Attributes:
        rank: the most directions of a matrix.
        parts: reference passes for each set.
        num_bytes: the most that the bases take in this process.
        device: where they are.
        sharded: False: every process has all bases.
        unreached: the names of every `B` whose `A` was changed like this.
    """

    parts = 1
    sharded = False

    def __init__(self, settings: Settings, engine: Engine, model: torch.nn.Module) -> None:
        """Look the matrices up; every process calls it.

        Raises:
            ValueError: a matrix is kept transposed, and processes share its gradient; or an adapter is DoRA's.
        """
        self._settings = settings
        self._engine = engine
        self._model = model
        if any("lora_magnitude_vector" in name for name in engine.names):
            raise ValueError(
                "the adapter uses DoRA (`use_dora`), where B changes the output for every input; allowed with "
                "`ogpsa_scope: inputs`: an adapter without DoRA."
            )
        self._modules = find_modules(engine, model)
        # Here, because FSDP2 has other tensors in a gathered module.
        head = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
        self._heads = {index for _, index in self._modules if engine.parameters[index] is head}
        self._transposed = {index for module, index in self._modules if is_transposed(module)}
        if self._transposed and engine.processes.sharded:
            raise ValueError(
                f"`ogpsa_scope` is 'inputs', and {engine.names[min(self._transposed)]} is a matrix [in, out] (Conv1D) "
                "whose gradient is split over the processes (DeepSpeed ZeRO or FSDP); allowed: another scope, or DDP."
            )
        self.rank = settings.rank or DEFAULT_RANK
        self.device, self.kernel = settle_placement(engine, engine.device, settings.kernel)
        self._shapes = [tuple(getattr(param, "ds_shape", param.shape)) for param in engine.parameters]
        self.unreached: frozenset[str] = frozenset()
        matrices = [index for index, shape in enumerate(self._shapes) if len(shape) == 2]
        self.num_bytes = sum(4 * self._most(index) * self._width(index) for index in matrices)

    def _width(self, index: int) -> int:
        """Return the dimensions of a matrix's inputs."""
        return self._shapes[index][0 if index in self._transposed else 1]

    def _most(self, index: int) -> int:
        """Return the most directions of a matrix."""
        return most_directions(self._width(index), self.rank)

    def compute(self, passes: ReferencePasses) -> tuple[InputSubspace, dict[str, float]]:
        """Record the reference inputs at the current weights, and make bases of them.

        Returns:
            the subspace, and the reference losses by the name of the set.

        Raises:
            RuntimeError: no input of the output head, or of any trained matrix, was seen.
        """
        recorder = Recorder(self._modules, sum(map(len, passes.indices)))
        with recorder.recording(self._model):
            losses = passes.run_forward(recorder.begin_batch, recorder.end_batch)
        protected = self._protect(recorder)
        self._keep_out(protected)
        pairs = zip(self._engine.names, protected, strict=True)
        items = [Protected(unreached=True) if name in self.unreached else item for name, item in pairs]
        return self._wrap(items), losses

    @torch.no_grad()
    def _protect(self, recorder: Recorder) -> list[Protected]:
        """Make the bases; every process gets the same."""
        processes = self._engine.processes
        protected = [Protected(frozen=len(shape) < 2) for shape in self._shapes]
        # A process may have had no sample, or none that reached an expert, so all agree first on what to sum.
        shared = processes.union(recorder.shared)
        inputs_of: dict[int, tuple] = {}
        for indices in shared:
            inputs_of |= {index: (*inputs_of.get(index, ()), indices) for index in indices}
        self._check_seen(inputs_of)
        for sources in dict.fromkeys(inputs_of.values()):
            indices = [index for index, own in inputs_of.items() if own == sources]
            width = self._width(indices[0])
            rows = torch.cat([self._gather(recorder.rows(source, width)) for source in sources])
            # Not on the engine's device: with ZeRO's CPU offload that is the host, where it would take an hour.
            directions = self._agree(leading_directions(rows.to(processes.device), self.rank)).to(self._engine.device)
            # Without a direction (an expert that is called with no token) there is no basis.
            for index in indices if len(directions) else ():
                own = directions[: self._most(index)].contiguous()
                protected[index] = Protected(own, index in self._transposed)
        for index in processes.union(recorder.tokens):
            if protected[index].basis is None:
                none = torch.zeros(self._shapes[index][0], dtype=torch.bool)
                seen = processes.sum(recorder.tokens.get(index, none).to(torch.int32)) > 0
                protected[index] = Protected(width=self._shapes[index][1], tokens=seen.to(self._engine.device))
        return protected

    def _check_seen(self, inputs_of: dict[int, tuple]) -> None:
        """Raise a RuntimeError if nothing was seen of what must be seen; `inputs_of`: the same in all processes."""
        head_unseen = bool(self._heads - inputs_of.keys())
        multiplied = any(not isinstance(module, torch.nn.Embedding) for module, _ in self._modules)
        if head_unseen or (multiplied and not inputs_of):
            unseen = "the output head" if head_unseen else "any trained weight matrix"
            raise RuntimeError(
                f"`ogpsa_scope` is 'inputs', and no input of {unseen} was seen: no reference sample reaches it, or a fused "
                "kernel (`enable_liger_kernel`, `use_unsloth`) does not call its module. Allowed: reference sets that "
                "reach it, no such kernel, or another scope."
            )

    def _agree(self, directions: torch.Tensor) -> torch.Tensor:
        """Return the first process's directions in all; machines may differ in how many they find."""
        processes = self._engine.processes
        count = int(processes.agree(torch.tensor(len(directions))))
        shared = directions.new_zeros(count, directions.shape[1])
        shared[: len(directions)] = directions[:count]
        return processes.agree(shared)

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of all processes."""
        processes = self._engine.processes
        if processes.size == 1:
            return rows

        own = [len(rows) if rank == processes.rank else 0 for rank in range(processes.size)]
        counts = [int(count) for count in processes.totals(own)]
        start = sum(counts[: processes.rank])
        table = torch.zeros(sum(counts), rows.shape[1], dtype=torch.float32)
        table[start : start + len(rows)] = rows
        return processes.sum(table)

    def _adapters(self) -> dict[int, int]:
        """Return the index of LoRA's `A` for each `B`."""
        positions = {name: index for index, name in enumerate(self._engine.names)}
        pairs = {name: name.replace("lora_B", "lora_A") for name in positions if "lora_B" in name}
        return {positions[b]: positions[a] for b, a in pairs.items() if a in positions}

    @torch.no_grad()
    def _keep_out(self, protected: list[Protected]) -> None:
        """Take the reference inputs' directions out of every `A` whose `B` is zero, if `A` has a basis.

        With `monitor` no `A` is changed; its `B` counts as unreached all the same, as in the run that it stands for.
        """
        weights = self._engine.weights()
        adapters = {b: a for b, a in self._adapters().items() if protected[a].basis is not None}
        zero = [float(weights[b] is None or not weights[b].part_of(weights[b].optimized).any()) for b in adapters]
        everywhere = self._engine.processes.totals(zero)
        size = self._engine.processes.size
        fresh = {b for b, count in zip(adapters, everywhere, strict=True) if count == size}
        self.unreached |= {self._engine.names[b] for b in fresh}

        def keep_out(index: int, rows: torch.Tensor) -> None:
            # With ZeRO's CPU offload the bases are on the host, and the weights are not.
            basis, kernel = protected[index].basis.to(rows.device), TorchRows()
            kernel.apply_(rows, kernel.coefficients(rows, basis)[0], basis, None)

        if self._settings.method != "monitor":
            self._engine.edit(sorted(adapters[b] for b in fresh), keep_out)

    def restore(self, read: Read, names: set[str]) -> InputSubspace:
        """Make the bases from a checkpoint's tensors.

        Raises:
            ValueError: they are not this run's; the message continues the file's name.
        """
        positions = {name: index for index, name in enumerate(self._engine.names)}
        foreign = {name for name in names if name.partition(".")[2] not in positions}
        if foreign:
            raise ValueError(f"has {min(foreign)!r}, a parameter that this run does not train")
        protected = [Protected(frozen=len(shape) < 2) for shape in self._shapes]
        for key in sorted(names):
            kind, _, name = key.partition(".")
            index, tensor = positions[name], read(key).to(self._engine.device)
            if kind == "tokens":
                protected[index] = Protected(width=self._shapes[index][1], tokens=tensor.bool())
            elif kind == "unreached":
                protected[index] = Protected(unreached=True)
            else:
                if len(self._shapes[index]) != 2 or tensor.shape[1] != self._width(index):
                    raise ValueError(f"has {tensor.shape[1]} inputs for {name}, this run another number")
                protected[index] = Protected(tensor, index in self._transposed)
        return self._wrap(protected)

    def _wrap(self, protected: list[Protected]) -> InputSubspace:
        engine = self._engine
        return InputSubspace(engine.names, protected, engine.sizes, engine.device, engine.offsets, engine.processes)

    def made_by(self) -> dict[str, Any]:
        """Return the options that the bases depend on for what they are, and not only for how good they are."""
        made_by = {"ogpsa_rank": self.rank, "ogpsa_scope": self._settings.scope}
        # With `monitor` no `A` is changed, so that a run that goes on with `orthogonal` would not be protected.
        return made_by | ({"ogpsa_method": self._settings.method} if self._adapters() else {})
