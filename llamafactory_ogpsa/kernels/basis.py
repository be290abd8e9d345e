"""Where the basis lies, with the gradients or in host memory, and in which pieces the kernels work on it."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch


# Size of each of the two buffers on the device: enough for a copy to reach the bus's speed, small beside gradients.
BUCKET_BYTES = 64 << 20
ALIGNMENT = 256
# Tensors are cut at multiples of so many elements, so that their later pieces stay aligned to 16 bytes.
CUT = 16


class Piece(NamedTuple):
    """A run of consecutive elements of one parameter tensor, with its basis.

    Attributes:
        tensor: index of the parameter tensor.
        group: the group whose coefficients the piece adds to.
        start: first element, counted in the flattened parameter tensor.
        basis: tensor `[rank, length]`, float32 or bfloat16, rows contiguous, on the device that computes.
    """

    tensor: int
    group: int
    start: int
    basis: torch.Tensor

    @property
    def length(self) -> int:
        return self.basis.shape[1]


class ResidentBasis:
    """A basis on the device that computes, one piece per tensor.

    Pieces come in the order of their groups, so that each group's partial sums lie together; empty tensors have none.
    """

    def __init__(self, basis: Sequence[torch.Tensor], groups: Sequence[int]) -> None:
        self.device = basis[0].device
        self.pieces = [Piece(i, groups[i], 0, basis[i]) for i in _by_group(groups) if basis[i].shape[1] > 0]
        self.buckets = [range(len(self.pieces))]

    def load(self) -> Iterator[range]:
        """Yield each bucket, a range of `pieces`, while its basis may be read."""
        yield from self.buckets


class StreamedBasis(ResidentBasis):
    """A basis in pinned host memory, copied to the device one bucket at a time while the bucket before is worked on.

    A bucket holds as many pieces as fit; a tensor that does not fit is cut. Even buckets pass through one buffer, odd
    ones through the other, so each piece has a fixed place on the device. Memory that is not pinned works too, but is
    copied while the host waits.
    """

    def __init__(
        self,
        basis: Sequence[torch.Tensor],
        groups: Sequence[int],
        device: torch.device,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.device = device
        self.pieces: list[Piece] = []
        self.buckets: list[range] = []
        size = min(bucket_bytes, sum(_padded(b.nbytes) for b in basis))
        size = _padded(max(size, CUT * max(b.shape[0] * b.itemsize for b in basis)))
        self._buffers = torch.empty(2, size, dtype=torch.uint8, device=device)
        self._host: list[torch.Tensor] = []
        self._copier = torch.cuda.Stream(device) if device.type == "cuda" else None
        used = size
        for i in _by_group(groups):
            used = self._place(basis[i], i, groups[i], used)

    def load(self) -> Iterator[range]:
        """Yield each bucket, a range of `pieces`, while its basis may be read.

        Work on a bucket must be queued on the current stream before the next bucket is taken.
        """
        if self._copier is None:
            for bucket in self.buckets:
                self._copy(bucket)
                yield bucket
            return

        if not self.buckets:
            return

        main = torch.cuda.current_stream(self.device)
        # Both buffers may still be in use by what an earlier pass has queued.
        released = main.record_event()
        self._copier.wait_event(released)
        copied = self._copy_aside(0)
        for k, bucket in enumerate(self.buckets):
            ready = copied
            if k + 1 < len(self.buckets):
                # The next bucket takes the place of the one before this one.
                self._copier.wait_event(released)
                copied = self._copy_aside(k + 1)
            main.wait_event(ready)
            yield bucket
            released = main.record_event()

    def _place(self, tensor: torch.Tensor, index: int, group: int, used: int) -> int:
        """Make the pieces of a tensor's basis `[rank, numel]`, in the last bucket while it has room, then in new ones.

        `used` is the number of bytes used in the last bucket; the new number is returned.
        """
        rank, numel = tensor.shape
        width = rank * tensor.itemsize
        start = 0
        while start < numel:
            room = (self._buffers.shape[1] - used) // width
            length = numel - start if numel - start <= room else room // CUT * CUT
            if length == 0:
                self.buckets.append(range(len(self.pieces), len(self.pieces)))
                used = 0
                continue

            buffer = self._buffers[(len(self.buckets) - 1) % 2]
            place = buffer[used : used + length * width].view(tensor.dtype).view(rank, length)
            self.pieces.append(Piece(index, group, start, place))
            self._host.append(tensor[:, start : start + length])
            self.buckets[-1] = range(self.buckets[-1].start, len(self.pieces))
            used += _padded(length * width)
            start += length

        return used

    def _copy_aside(self, k: int) -> torch.cuda.Event:
        with torch.cuda.stream(self._copier):
            self._copy(self.buckets[k])
            return self._copier.record_event()

    def _copy(self, bucket: range) -> None:
        for i in bucket:
            place, host = self.pieces[i].basis, self._host[i]
            # Only contiguous memory is copied asynchronously: rows, or a whole tensor at once.
            parts = [(place, host)] if host.is_contiguous() else zip(place, host, strict=True)
            for to, source in parts:
                to.copy_(source, non_blocking=True)


def _by_group(groups: Sequence[int]) -> list[int]:
    """Return the tensor indices ordered by group, and within a group as they were."""
    return sorted(range(len(groups)), key=groups.__getitem__)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
