"""A basis in host memory: its pieces, its numbers, and the order of copies and work."""

import contextlib

import pytest
import torch
from kernel_cases import IMPLEMENTATIONS, Case, assert_close

from llamafactory_ogpsa.kernels import make_plan
from llamafactory_ogpsa.kernels.basis import StreamedBasis
from llamafactory_ogpsa.kernels.torch_plan import TorchPlan
from llamafactory_ogpsa.kernels.triton_plan import TritonPlan


NUMELS = [700, 0, 33, 2100, 5]
GROUPS = [1, 0, 0, 1, 2]


def _streamed(case, kernel, bucket_bytes):
    plan = {"torch": TorchPlan, "triton": TritonPlan}[kernel]
    device = torch.empty(0, device="cuda").device if torch.cuda.is_available() else torch.device("cpu")
    host = [b.cpu().pin_memory() if device.type == "cuda" else b for b in case.basis]
    source = StreamedBasis(host, case.groups, device, bucket_bytes)
    return source, plan(source, [b.shape[1] for b in host], case.num_groups, case.rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bucket_bytes", [1, 2000, 10_000, 1 << 20])
def test_pieces_cover_the_basis_once(bucket_bytes, dtype):
    case = Case(NUMELS, GROUPS, 3, dtype)
    source = StreamedBasis(case.basis, GROUPS, torch.device("cpu"), bucket_bytes)
    seen = [torch.zeros(b.shape[1], dtype=torch.int32) for b in case.basis]
    order = []
    for bucket in source.load():
        order += bucket
        for i in bucket:
            tensor, group, start, basis = source.pieces[i]
            assert group == GROUPS[tensor]
            assert torch.equal(basis, case.basis[tensor][:, start : start + basis.shape[1]])
            assert basis.data_ptr() % 16 == 0
            seen[tensor][start : start + basis.shape[1]] += 1
    assert order == list(range(len(source.pieces)))
    assert all((s == 1).all() for s in seen)
    groups = [piece.group for piece in source.pieces]
    assert groups == sorted(groups)


@pytest.mark.parametrize("way", [p for p in IMPLEMENTATIONS if torch.cuda.is_available() == ("gpu" in p.id)])
@pytest.mark.parametrize("bucket_bytes", [3000, 1 << 20])
def test_streamed_numbers(way, bucket_bytes):
    kernel, device = way
    dtypes = [torch.float32, torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]
    case = Case(NUMELS, GROUPS, 3, dtypes=dtypes, device=device)
    source, plan = _streamed(case, kernel, bucket_bytes)
    assert len(source.buckets) == (1 if bucket_bytes > 100_000 else 12)
    for _ in range(2):
        c, sq = plan.coefficients(case.gradients)
        expected_c, expected_sq, size = case.coefficients()
        assert ((c.double().cpu() - expected_c).abs() <= 1e-6 * size).all()
        torch.testing.assert_close(sq.double().cpu(), expected_sq, rtol=1e-6, atol=0)
    _, _, norm = plan.orthogonal_(case.gradients, case.inverse_gram(), 1.0)
    assert norm.item() == pytest.approx(case.projected_norm(), rel=1e-5)
    assert_close(case.gradients, case.projected(1.0), case.before, kernel, slack=2e-6)


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_basis_and_gradients_on_the_device(kernel):
    case = Case([40_000, 3001], [0, 0], 4, device="cuda")
    basis = [b.cpu().pin_memory() for b in case.basis]
    plan = make_plan(basis, case.groups, 1, kernel=kernel, device="cuda")
    plan.orthogonal_(case.gradients, case.inverse_gram(), 1.0)
    assert_close(case.gradients, case.projected(1.0), case.before, kernel, slack=2e-6)


class _Stream:
    """A stream that runs nothing and knows, for each of its moments, what is certain to have happened before."""

    def __init__(self):
        self.done = set()

    def record_event(self):
        return set(self.done)

    def wait_event(self, event):
        self.done |= event


@pytest.mark.parametrize("passes", [1, 3])
def test_copies_and_work_wait_for_each_other(monkeypatch, passes):
    """No copy may overtake the work on what it overwrites, and no work the copy of what it reads."""
    main, copier = _Stream(), _Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    case = Case([3000], [0], 2)
    source = StreamedBasis(case.basis, [0], torch.device("cpu"), 4000)
    source._copier = copier
    copies, works = [], []
    assert len(source.buckets) > 4

    def copy(bucket):
        turn = len(copies) % len(source.buckets)
        assert bucket == source.buckets[turn]
        same_buffer = [w for w in works if w[1] % 2 == turn % 2]
        assert set(same_buffer) <= copier.done
        # There is overlap because the copy is queued ahead of the work on the bucket before.
        assert len(works) == len(copies) - min(turn, 1)
        copies.append(("copied", turn, len(copies) // len(source.buckets)))
        copier.done.add(copies[-1])

    monkeypatch.setattr(source, "_copy", copy)
    for run in range(passes):
        for turn, _ in enumerate(source.load()):
            assert ("copied", turn, run) in main.done
            works.append(("work", turn, run))
            main.done.add(works[-1])
