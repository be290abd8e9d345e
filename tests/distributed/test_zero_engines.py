"""DeepSpeed's ZeRO at the level of engine and projection: precisions, uneven partitions, parameters not reached."""

import importlib.util

import pytest
import sharded
from forks import run_forked


pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.mark.parametrize(
    ("stage", "offload", "dtype", "scope", "processes"),
    [
        (1, False, "float32", "parameter", 3),
        (1, True, "float32", "global", 2),
        (2, False, "float32", "global", 3),
        (2, True, "float32", "parameter", 2),
        (3, False, "float32", "parameter", 3),
        (3, True, "float32", "global", 2),
        (2, False, "bfloat16", "parameter", 2),
        (2, True, "bfloat16", "parameter", 2),
        (3, False, "bfloat16", "parameter", 2),
        (2, False, "float16", "parameter", 2),
        (3, False, "float16", "global", 2),
    ],
)
def test_partitions_are_measured_like_the_whole(tmp_path, monkeypatch, stage, offload, dtype, scope, processes):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import zero_engines
    from deepspeed.accelerator import get_accelerator

    if dtype == "float16" and not get_accelerator().is_fp16_supported():
        pytest.skip("DeepSpeed has no fp16 on this processor")
    tolerance = {"float32": 1e-5, "float16": 0.01, "bfloat16": 0.05}[dtype]
    work = (zero_engines.measure_like_the_whole, stage, offload, dtype, scope, tolerance)
    run_forked(tmp_path, sharded.start, *work, processes=processes)
