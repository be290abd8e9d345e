"""Engine and projection where every process holds a shard of each gradient: FSDP2 on a gloo mesh."""

import pytest
import sharded
from forks import run_forked


def on_processes(world_size, tmp_path, work, *arguments):
    """Run a function of `sharded` in processes of their own; a failure in any of them fails the test."""
    run_forked(tmp_path, sharded.start, work, *arguments, processes=world_size)


@pytest.mark.parametrize(
    ("scope", "method", "parts", "world_size", "mesh_shape"),
    [
        ("parameter", "orthogonal", 1, 2, None),
        ("global", "orthogonal", 2, 3, None),
        ("parameter", "conflict", 1, 2, None),
        ("global", "monitor", 1, 2, None),
        ("parameter", "orthogonal", 1, 4, (2, 2)),
    ],
)
def test_shards_are_projected_like_the_whole(tmp_path, scope, method, parts, world_size, mesh_shape):
    on_processes(world_size, tmp_path, sharded.project_like_the_whole, scope, method, parts, mesh_shape)


@pytest.mark.parametrize("method", ["orthogonal", "conflict"])
@pytest.mark.parametrize("scope", ["parameter", "global"])
def test_a_step_adds_one_collective_and_no_large_tensor(tmp_path, scope, method):
    on_processes(2, tmp_path, sharded.count_what_a_step_costs, scope, method)


def test_a_gradient_that_is_not_finite_in_one_process_is_left_alone_in_all(tmp_path):
    on_processes(2, tmp_path, sharded.disagree)


def test_a_loss_that_is_not_finite_in_one_process_is_left_out_in_all(tmp_path):
    on_processes(2, tmp_path, sharded.drop_the_same_batches)


def test_a_trainable_parameter_that_is_not_sharded_is_refused(tmp_path):
    on_processes(2, tmp_path, sharded.refuse_what_is_not_sharded)


def test_a_process_without_a_sample_takes_part_in_scope_inputs(tmp_path):
    on_processes(2, tmp_path, sharded.record_one_sample)


@pytest.mark.parametrize("reshard", [None, False])
def test_what_fsdp_has_gathered_is_recorded_and_edited(tmp_path, reshard):
    on_processes(2, tmp_path, sharded.record_what_is_gathered, reshard)
