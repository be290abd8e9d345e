"""`torch_compile: true`: the figures of a run without it, and not one graph more than the stock run compiles."""

import copy

import pytest
import torch
from conftest import OGPSA, read_rows, run_here


COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


def compiled_graphs(args):
    """Run, and return how many graphs torch.compile made."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run_here(args)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    "options",
    [{}, {"ogpsa_scope": "inputs"}, {"finetuning_type": "lora"}, {"finetuning_type": "lora", "ogpsa_scope": "inputs"}],
    ids=["full", "inputs", "lora", "lora-inputs"],
)
def test_a_compiled_run_is_the_run(base_args, tmp_path, options):
    # Reference batches of 4, 1 and 2 samples: as many shapes.
    stock = {**base_args, **COMPILED, "max_grad_norm": 0.0, "output_dir": str(tmp_path / "stock")}
    if "finetuning_type" in options:
        stock["finetuning_type"] = options["finetuning_type"]
    graphs = compiled_graphs(copy.deepcopy(stock))
    assert graphs > 0

    asking = {**base_args, "max_grad_norm": 0.0, **OGPSA, **options}
    assert compiled_graphs({**asking, **COMPILED, "output_dir": str(tmp_path / "compiled")}) == graphs
    run_here({**asking, "output_dir": str(tmp_path / "plain")})

    (steps, refreshes), (plain_steps, plain_refreshes) = (read_rows(tmp_path / n) for n in ("compiled", "plain"))
    assert len(steps) == len(plain_steps) == 3
    assert len(refreshes) == len(plain_refreshes)
    for one, other in zip(refreshes, plain_refreshes, strict=True):
        assert one["reference_loss"] == pytest.approx(other["reference_loss"], rel=1e-4)
        assert one["covered_tensors"] == other["covered_tensors"] > 0
    for one, other in zip(steps, plain_steps, strict=True):
        assert one["removed"] == pytest.approx(other["removed"], rel=1e-3, abs=1e-6)
        assert one["residual"] < 1e-4
