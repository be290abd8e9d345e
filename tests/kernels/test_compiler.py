"""The real compiler, which needs no GPU, on every kernel: the interpreter accepts more than it does."""

import json
import os
import subprocess
import sys

import pytest


SCRIPT = r"""
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llamafactory_ogpsa.kernels import triton_kernels, triton_rows

try:
    from triton.backends.compiler import AttrsDescriptor  # Triton 3.2
except ImportError:
    AttrsDescriptor = None

backend, architecture, warp = json.loads(sys.argv[1])
cases = json.loads(sys.argv[2])
TYPES = dict(tile_piece="*i32", max_norm="fp32", norms="*fp64")
TYPES.update(dict.fromkeys(["gradients", "pieces", "group_tiles"], "*i64"))
TYPES.update(dict.fromkeys(["first", "last", "num_pieces", "num_tiles", "num_groups", "rows", "columns"], "i32"))
for name, constants in cases:
    kernel = getattr(triton_rows if name.startswith("rows") else triton_kernels, name)
    TYPES["gradient"], warps = constants.pop("gradient", None), constants.pop("warps", 8)
    sixteens = constants.pop("sixteens", [])  # integers that are multiples of 16, which the compiler makes use of
    names = kernel.arg_names
    signature = {n: "constexpr" if n.isupper() else TYPES.get(n, "*fp32") for n in names}
    pointers = [i for i, n in enumerate(names) if signature[n].startswith("*") or n in sixteens]
    if AttrsDescriptor is None:
        aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    else:
        signature = {n: kind for n, kind in signature.items() if kind != "constexpr"}
        aligned = AttrsDescriptor.from_dict({"cls": "AttrsDescriptor", "arg_properties": {"tt.divisibility": pointers}})
    source = ASTSource(kernel, signature, {n: constants[n] for n in names if n.isupper()}, aligned)
    compiled = triton.compile(source, target=GPUTarget(backend, architecture, warp), options={"num_warps": warps})
    ptx = compiled.asm.get("ptx", "")
    loads = re.findall(r"(?:ld|st)\.global\.[.\w]+", ptx)
    offsets = re.findall(r"tt\.addptr .*: tensor<\d+x\d+x!tt.*, tensor<\d+x\d+x(\w+)>", compiled.asm["ttir"])
    spilled = []
    if ptx:
        # Triton brings NVIDIA's assembler, which says what the loader would on a GPU.
        assembler = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        target = re.search(r"\.target\s+(\w+)", ptx).group(1)
        with tempfile.TemporaryDirectory() as folder:
            source = pathlib.Path(folder, "kernel.ptx")
            source.write_text(ptx)
            command = [assembler, "-v", f"-arch={target}", source, "-o", source.with_suffix(".cubin")]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        spilled = [int(size) for size in re.findall(r"(\d+) bytes spill stores", said)]
    print(json.dumps({"kernel": name, "binary": len(compiled.kernel), "accesses": loads, "spilled": spilled, "offsets": offsets}))
"""

# A driver that only pretends to launch, on tensors of the CPU, which the compiler takes for a GPU's.
FIRST_STEP = r"""
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from llamafactory_ogpsa.kernels.basis import ResidentBasis
from llamafactory_ogpsa.kernels.triton_plan import TritonPlan


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compiled(self, *args):
    counts["compiled"] += 1
    make(self, *args)


def load(self):
    if self.module is None:
        self.module = "loaded"
        counts["loaded"] += 1
        entry = "_run" if hasattr(type(self), "run") else "run"  # Triton 3.2 has the latter
        setattr(self, entry, lambda *args: counts.update(launched=counts["launched"] + 1))


driver.set_active(Driver())
make, CompiledKernel.__init__, CompiledKernel._init_handles = CompiledKernel.__init__, compiled, load
counts = dict(compiled=0, loaded=0, launched=0)
for numels, groups, dtypes in [
    ([4096] * 5 + [512], range(6), [torch.bfloat16] * 6),
    ([4097, 512, 1], [0, 0, 0], [torch.float32, torch.bfloat16, torch.bfloat16]),
]:
    source = ResidentBasis([torch.zeros(2, numel) for numel in numels], groups)
    plan = TritonPlan(source, numels, max(groups) + 1, 2)
    plan.warmup(dtypes)
    print(counts["compiled"], counts["loaded"], counts["launched"])
    gradients = [torch.zeros(numel, dtype=dtype) for numel, dtype in zip(numels, dtypes)]
    inverse_gram = torch.eye(2).repeat(plan.num_groups, 1, 1)
    c, sq = plan.coefficients(gradients)
    plan.apply_(gradients, torch.zeros_like(c))
    plan.apply_(gradients, torch.zeros_like(c), torch.tensor(0.5))
    for max_norm in (None, 1, 1.0, 0.3):
        plan.orthogonal_(gradients, inverse_gram, max_norm)
    print(counts["compiled"], counts["loaded"], counts["launched"])
"""

ALIGNED_BFLOAT16, ALIGNED_FLOAT32, UNALIGNED_BFLOAT16, ALL_GRADIENTS, ALL_BASES = 0b100, 0b1, 0b1000, 0b111111, 0b1111


def _constants(rank, gradient_kinds, basis_kinds, flag):
    padded = 1 << (rank - 1).bit_length()
    return dict(
        RANK=rank, ROWS=min(8, padded), PADDED=padded, GROUPS=512, TILE=65536, BLOCK=2048, SOLVE=flag, DECIDE=flag,
        GRADIENT_KINDS=gradient_kinds, BASIS_KINDS=basis_kinds,
    )  # fmt: skip


def _run(script, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def _compile(target, cases):
    run = _run(SCRIPT, json.dumps(target), json.dumps(cases))
    if run.returncode != 0 and target[0] == "hip" and "ROCm linker" in run.stderr:
        pytest.skip("this Triton takes the linker of a ROCm that is not installed")
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize(
    "target", [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)], ids=lambda t: str(t[1])
)
def test_every_kernel_compiles(target):
    cases = []
    for rank, gradients, bases in [(2, ALIGNED_BFLOAT16, ALIGNED_BFLOAT16), (3, ALL_GRADIENTS, ALL_BASES), (32, 1, 1)]:
        cases.append(("partial_sums_kernel", _constants(rank, gradients, bases, True)))
        for flag in (True, False):
            cases.append(("reduce_kernel", dict(_constants(rank, gradients, bases, flag), BLOCK=128)))
            cases.append(("apply_kernel", _constants(rank, gradients, bases, flag)))
    results = _compile(target, cases)
    assert [r["kernel"] for r in results] == [name for name, _ in cases]
    assert all(r["binary"] > 0 for r in results)


@pytest.mark.parametrize(
    "target", [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)], ids=lambda t: str(t[1])
)
def test_the_kernels_of_scope_inputs_compile_and_spill_nothing(target):
    cases = []
    for k, gradient, sixteens in [
        (1, "*bf16", ["columns"]),
        (64, "*fp16", []),
        (96, "*bf16", ["columns"]),
        (128, "*bf16", []),
        (128, "*fp32", []),
        (128, "*fp32", ["columns"]),
    ]:
        padded = max(16, 1 << (k - 1).bit_length())
        precision = "tf32x3" if target[0] == "cuda" else "ieee"
        constants = dict(K=k, PADDED=padded, ROWS=32, COLUMNS=32, PRECISION=precision)
        constants |= dict(gradient=gradient, sixteens=sixteens, warps=8 if padded > 64 else 4)
        cases.append(("rows_coefficients_kernel", constants))
        cases.append(("rows_apply_kernel", dict(constants, CHUNK=min(32, padded))))
    results = _compile(target, cases)
    assert all(r["binary"] > 0 for r in results)
    # Offsets in a matrix of more than 2³¹ elements do not fit 32 bits.
    assert all(r["offsets"] and set(r["offsets"]) == {"i64"} for r in results)
    if target[0] == "cuda":
        assert [r["spilled"] for r in results] == [[0]] * len(cases)


def test_aligned_tensors_are_read_and_written_16_bytes_at_a_time():
    def constants(gradient_kinds, basis_kinds):
        return _constants(2, gradient_kinds, basis_kinds, True)

    cases = [
        ("partial_sums_kernel", constants(ALIGNED_BFLOAT16, ALIGNED_BFLOAT16)),
        ("apply_kernel", constants(ALIGNED_BFLOAT16, ALIGNED_BFLOAT16)),
        ("partial_sums_kernel", constants(ALIGNED_FLOAT32, ALIGNED_FLOAT32)),
        ("apply_kernel", constants(ALIGNED_FLOAT32, ALIGNED_FLOAT32)),
        ("apply_kernel", constants(UNALIGNED_BFLOAT16, ALIGNED_BFLOAT16)),
    ]
    *aligned, mixed = [r["accesses"] for r in _compile(("cuda", 90, 32), cases)]
    # The gradient and two rows of the basis, eight elements a thread: one access each, two in float32.
    assert [a.count("ld.global.v4.b32") for a in aligned] == [3, 3, 6, 6]
    assert [a.count("st.global.v4.b32") for a in aligned] == [0, 1, 0, 2]
    assert not any("b16" in access for accesses in aligned for access in accesses)

    assert mixed.count("ld.global.v4.b32") == 2
    assert not any(access.startswith("st.global.v") for access in mixed)
    assert mixed.count("ld.global.b16") == mixed.count("st.global.b16") == 8


def test_the_first_step_finds_everything_compiled_and_loaded():
    run = _run(FIRST_STEP)
    assert run.returncode == 0, run.stderr
    counts = [[int(number) for number in line.split()] for line in run.stdout.splitlines()]
    # Five kernels, of which the second model can use two; two launches, two writes, and three for each projection.
    assert counts == [[5, 5, 0], [5, 5, 16], [8, 8, 16], [8, 8, 32]]
