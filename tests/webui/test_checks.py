"""What LlamaBoard says before it starts a run that could not run: what the command line would, and nothing else."""

import json
import os
import shutil

import pytest
from conftest import OGPSA


pytest.importorskip("gradio", reason="LlamaBoard needs gradio")

ZERO = {"zero_optimization": {"stage": 2}}


@pytest.fixture
def find_error(base_args):
    """Return what is found in a good OGPSA run after some changes; no check may leave anything in LlamaBoard's process."""
    import llamafactory.webui.interface  # noqa: F401  (as in LlamaBoard, everything has been imported)
    from accelerate.state import PartialState

    from llamafactory_ogpsa.plugin import board_checks

    def find_error(**changes):
        before = dict(os.environ), dict(PartialState._shared_state)
        error = board_checks.find_error({**base_args, **OGPSA, **changes}, "en")
        assert (dict(os.environ), PartialState._shared_state) == before
        return error

    return find_error


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ogpsa_rank": 5},
        {"ogpsa_rank": "5", "ogpsa_num_samples": "2e2"},
        {"ogpsa_save_state": "false"},
        {"ogpsa_scope": "inputs", "ogpsa_rank": 99},
        {"dataset_dir": "ONLINE", "ogpsa_dataset": "any/thing"},
        {"deepspeed": {"zero_optimization": {"stage": 1}}},
        {"deepspeed": json.dumps(ZERO)},
        {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}},
        {"fsdp": "full_shard", "fsdp_config": '{"version": 2}'},
        {"stage": "ogpsa_dpo"},
        {"stage": "ogpsa_dpo", "ogpsa_loss": "sft"},
        {"stage": "ogpsa_dpo", "ogpsa_dataset": "helpful_pairs"},
        {"stage": "ogpsa_kto"},
        {"stage": "ogpsa_kto", "ogpsa_dataset": "helpful_kto"},
        {"ogpsa_batch_size": "", "neftune_noise_alpha": None},  # not in the command that LlamaBoard writes
    ],
    ids=str,
)
def test_what_can_run_is_let_through(find_error, changes):
    assert find_error(**changes) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ogpsa_dataset": ""}, "Please choose at least one general set"),
        ({"ogpsa_dataset": "helpful,x"}, "has 'x', which is not in dataset_info.json; allowed: helpful,"),
        ({"ogpsa_dataset": "helpful_pairs"}, "'helpful_pairs', which is a ranking set"),
        ({"ogpsa_num_samples": None}, "Samples per set must be a positive integer"),
        ({"ogpsa_update_interval": 0}, "Update interval must be a positive integer"),
        ({"ogpsa_update_interval": "often"}, "`ogpsa_update_interval` is 'often'; allowed: a positive integer"),
        ({"ogpsa_update_interval": [2]}, "`ogpsa_update_interval` is [2]; allowed: a positive integer"),
        ({"ogpsa_rank": -1}, "OGPSA rank must be 0 or a positive integer"),
        ({"ogpsa_rank": "many"}, "`ogpsa_rank` is 'many'; allowed: a positive integer"),
        ({"ogpsa_rank": 99}, "`ogpsa_rank` is 99; allowed: at most 32"),
        ({"ogpsa_scope": "inputs", "ogpsa_method": "conflict"}, "`ogpsa_method` is 'conflict'"),
        ({"ogpsa_sope": "inputs"}, "`ogpsa_sope` is given, which OGPSA does not have; did you mean `ogpsa_scope`"),
        ({"max_stepps": 3}, "['max_stepps']"),
        ({"stage": "ogpsa"}, "`stage` is 'ogpsa'; allowed with OGPSA"),
        ({"stage": "sft"}, "neither `stage` (sft) nor"),
        ({"finetuning_type": "ogpsa_galore"}, "`finetuning_type` is 'ogpsa_galore'; allowed with OGPSA"),
        ({"use_badam": True}, "`use_badam` is True"),
        ({"use_galore": True, "galore_layerwise": True}, "`galore_layerwise` is True"),
        ({"use_kt": True}, "`use_kt` is True: OGPSA does not support"),
        ({"optim": "lomo"}, "`optim` is 'lomo'"),
        ({"image_max_pixels": "many"}, "TypeError: "),
        ({"deepspeed": "nowhere.json"}, "`deepspeed` is 'nowhere.json', which cannot be read"),
        ({"deepspeed": 3}, "`deepspeed` is 3, which cannot be read"),
        ({"deepspeed": {"zero_optimization": {"stage": 0}}}, "`zero_optimization.stage` of `deepspeed` is 0"),
        ({"deepspeed": {**ZERO, "optimizer": "Adam"}}, "which cannot be read ('str' object has no attribute 'get')"),
        ({"fsdp": True}, "`fsdp_config.version` is 1 under OGPSA; allowed: 2"),
        ({"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 1}}, "`fsdp_config.version` is 1 under OGPSA"),
        (
            {"fsdp": "full_shard", "fsdp_config": "nowhere.json"},
            "`fsdp_config` is 'nowhere.json', which cannot be read",
        ),
        ({"dataset_dir": "nowhere"}, "`dataset_dir` is 'nowhere'"),
        ({"dataset_dir": 3}, "`dataset_dir` is 3; allowed: a folder"),
        ({"stage": "ogpsa_dpo", "ogpsa_loss": "stage"}, "'helpful', which has no rankings"),
        ({"stage": "ogpsa_kto", "ogpsa_loss": "stage"}, "'helpful', which has no kto_tag"),
        ({"stage": "ogpsa_kto", "ogpsa_dataset": "helpful_pairs"}, "'helpful_pairs', which is a ranking set"),
        ({"stage": "ogpsa_rm", "ogpsa_loss": "sft"}, "`ogpsa_loss` is 'sft'"),
    ],
    ids=str,
)
def test_what_cannot_run_is_named(find_error, changes, message):
    assert message in find_error(**changes)


@pytest.mark.parametrize("content", ["[]", "3", "null", "no JSON"])
@pytest.mark.parametrize("option", ["deepspeed", "fsdp_config"])
def test_a_configuration_that_is_none_is_named(find_error, tmp_path, option, content):
    file = tmp_path / "config.json"
    file.write_text(content)
    assert f"`{option}` is '{file}', which cannot be read" in find_error(**{option: str(file)})


@pytest.mark.parametrize("content", ["[]", "3", "null", "no JSON"])
def test_a_list_of_datasets_that_is_none_is_named(find_error, tmp_path, content):
    (tmp_path / "dataset_info.json").write_text(content)
    assert f"`dataset_dir` is '{tmp_path}'; allowed: a folder with a dataset_info.json" in find_error(
        dataset_dir=str(tmp_path)
    )


def test_a_missing_file_is_named(find_error, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    (tmp_path / "data" / "helpful.json").unlink()
    assert "'helpful', whose `file_name` in dataset_info.json" in find_error(dataset_dir=str(tmp_path / "data"))


@pytest.mark.parametrize("variable", ["USE_MCA", "USE_KT"])
def test_another_backend_is_named(find_error, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert f"`{variable}` is set: OGPSA does not support" in find_error()


def test_a_kernel_is_checked_for_the_device_of_the_run(find_error, monkeypatch):
    from llamafactory_ogpsa.kernels import triton_kernels
    from llamafactory_ogpsa.plugin import board_checks

    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    monkeypatch.setattr(board_checks, "get_current_device", lambda: board_checks.torch.device("meta"))
    for use_cpu, device in [(True, "cpu"), (False, "meta")]:
        message = (
            f"`ogpsa_kernel` is 'triton', but Triton needs a CUDA or ROCm device, and the gradients are on {device}"
        )
        assert message in find_error(ogpsa_kernel="triton", use_cpu=use_cpu)


def test_a_misspelt_option_is_named_where_llamafactory_ignores_it(find_error, monkeypatch):
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    assert find_error(max_stepps=3) == ""
    assert "`ogpsa_sope` is given" in find_error(ogpsa_sope="inputs")
