"""Wrong options: one sentence that names the option, what was given and what is allowed, before a model is loaded."""

import json
import shutil

import pytest
from conftest import OGPSA, need_llamafactory, run_here


# What is changed on a good run, and what the message must hold.
CASES = [
    ({"ogpsa_dataset": None}, "`ogpsa_dataset` is None; allowed: names"),
    ({"ogpsa_dataset": ""}, "`ogpsa_dataset` is '', which has an empty name"),
    ({"ogpsa_dataset": "helpful,"}, "`ogpsa_dataset` is 'helpful,', which has an empty name"),
    ({"ogpsa_dataset": 3}, "`ogpsa_dataset` is 3; allowed"),
    ({"ogpsa_dataset": "helpfull"}, "'helpfull', which is not in dataset_info.json; allowed: helpful, helpful_again"),
    ({"ogpsa_dataset": "helpful,helpful"}, "helpful is in it twice"),
    ({"ogpsa_dataset": "helpful_pairs"}, "'helpful_pairs', which is a ranking set.*plain records.*without rankings"),
    (
        {"stage": "ogpsa_dpo", "dataset": "safety_pairs", "ogpsa_loss": "stage"},
        "'helpful', which has no rankings.*allowed: a set with rankings, or `ogpsa_loss: auto`",
    ),
    (
        {"stage": "ogpsa_dpo", "ogpsa_loss": "sft", "ogpsa_dataset": "helpful_pairs"},
        "which is a ranking set.*set `ogpsa_loss: auto`",
    ),
    ({"stage": "ogpsa_rm"}, "'helpful', which has no rankings.*allowed: a set with rankings\\."),
    (
        {"stage": "ogpsa_kto", "dataset": "safety_kto", "ogpsa_loss": "stage"},
        "no kto_tag column.*or `ogpsa_loss: auto`",
    ),
    ({"stage": "ogpsa_pt", "ogpsa_loss": "sft"}, "`ogpsa_loss` is 'sft', which stage pt"),
    *[
        ({name: value}, f"`{name}` is {value!r}; allowed: a positive integer".replace(".", "\\."))
        for name in ("ogpsa_num_samples", "ogpsa_update_interval", "ogpsa_rank", "ogpsa_batch_size")
        for value in (0, -1, "many", 2.5, True, "2.5", "0")
    ],
    ({"ogpsa_refresh_samples": 0}, "`ogpsa_refresh_samples` is 0; allowed: a positive integer"),
    ({"ogpsa_refresh_samples": 201}, "`ogpsa_refresh_samples` is 201; allowed: at most `ogpsa_num_samples`.*200"),
    ({"ogpsa_rank": 33}, "`ogpsa_rank` is 33; allowed: at most 32"),
    ({"ogpsa_rank": 5, "ogpsa_num_samples": 2}, "`ogpsa_rank` is 5; allowed: at most 4"),
    ({"ogpsa_rank": 32}, "`ogpsa_rank` is 32, which splits 'helpful' into 16 parts.* only 13 usable.*at most 26"),
    ({"ogpsa_scope": "layer"}, "`ogpsa_scope` is 'layer'; allowed: parameter, global"),
    (
        {"ogpsa_scope": "inputs", "ogpsa_method": "conflict"},
        "`ogpsa_method` is 'conflict', .*`ogpsa_scope: inputs` has none; allowed with it: orthogonal, monitor",
    ),
    (
        {"ogpsa_scope": "inputs", "finetuning_type": "lora", "use_dora": True},
        "`use_dora` is True: .*`ogpsa_scope: inputs`.*allowed with it: False",
    ),
    (
        {"ogpsa_scope": "inputs", "finetuning_type": "oft"},
        "`finetuning_type` is 'oft', .*`ogpsa_scope: inputs`.*allowed with it: full, freeze, lora",
    ),
    (
        {"ogpsa_scope": "inputs", "ogpsa_rank": 4097},
        "`ogpsa_rank` is 4097; allowed with `ogpsa_scope: inputs`: 1 to 4096",
    ),
    ({"ogpsa_sope": "inputs"}, "`ogpsa_sope` is given, which OGPSA does not have; did you mean `ogpsa_scope`"),
    ({"ogpsa_zzz": 1}, "`ogpsa_zzz` is given, which OGPSA does not have; allowed: ogpsa_dataset, ogpsa_num_samples"),
    (
        {"stage": "ogpsa"},
        "`stage` is 'ogpsa'; allowed with OGPSA: ogpsa_pt, ogpsa_sft, ogpsa_rm, ogpsa_dpo, ogpsa_kto",
    ),
    ({"ogpsa_method": "threshold"}, "`ogpsa_method` is 'threshold'; allowed: orthogonal, conflict, monitor"),
    ({"ogpsa_loss": "dpo"}, "`ogpsa_loss` is 'dpo'; allowed: auto, stage, sft"),
    ({"ogpsa_basis_device": "gpu"}, "`ogpsa_basis_device` is 'gpu'; allowed: auto, accelerator, cpu"),
    (
        {"ogpsa_scope": "inputs", "ogpsa_basis_device": "cpu"},
        "`ogpsa_basis_device` is 'cpu', but .*`ogpsa_scope: inputs`.*allowed with it: auto",
    ),
    ({"ogpsa_basis_dtype": "float16"}, "`ogpsa_basis_dtype` is 'float16'; allowed: auto, float32, bfloat16"),
    ({"ogpsa_kernel": "cuda"}, "`ogpsa_kernel` is 'cuda'; allowed: auto, triton, torch"),
    ({"ogpsa_save_state": "sometimes"}, "`ogpsa_save_state` is 'sometimes'; allowed: true, false"),
    *[
        (
            {"stage": stage, "ogpsa_update_interval": None},
            f"`ogpsa_dataset` is 'helpful,truthful', but neither `stage` \\({stage}\\) nor `finetuning_type` "
            f"\\(full\\) asks for OGPSA; change `stage: {stage}` to `stage: ogpsa_{stage}`, or remove `ogpsa_dataset`\\.",
        )
        for stage in ("pt", "sft", "rm", "dpo", "kto")
    ],
    ({"stage": "ppo"}, "asks for OGPSA; remove `ogpsa_dataset`, `ogpsa_update_interval`\\."),
    ({"stage": "ogpsa_ppo"}, "`stage` is 'ogpsa_ppo'; allowed with OGPSA: ogpsa_pt, ogpsa_sft"),
    ({"stage": "ppo", "finetuning_type": "ogpsa_full"}, "`stage` is 'ppo'.*OGPSA does not support"),
    ({"finetuning_type": "ogpsa_galore"}, "`finetuning_type` is 'ogpsa_galore'; allowed with OGPSA: .*ogpsa_full"),
    ({"use_badam": True}, "`use_badam` is True, which OGPSA does not support"),
    ({"use_galore": True, "galore_layerwise": True}, "`galore_layerwise` is True, which OGPSA does not support"),
    ({"use_apollo": True, "apollo_layerwise": True}, "`apollo_layerwise` is True, which OGPSA does not support"),
    ({"use_hyper_parallel": True}, "`use_hyper_parallel` is True, which OGPSA does not support"),
    ({"optim": "lomo"}, "`optim` is 'lomo', which steps inside the backward pass"),
    ({"optim": "adalomo"}, "`optim` is 'adalomo', which steps inside the backward pass"),
    ({"optim": "apollo_adamw_layerwise"}, "`optim` is 'apollo_adamw_layerwise', which steps inside the backward pass"),
    ({"optim": "galore_adamw_layerwise"}, "`optim` is 'galore_adamw_layerwise', which steps inside the backward pass"),
    ({"ogpsa_method": "conflict", "ogpsa_rank": 3}, "`ogpsa_rank` is 3.*`ogpsa_method: conflict`.*multiples of 2"),
    ({"ogpsa_dataset": "helpful_odd"}, "'helpful_odd', which cannot be read .KeyError: 'nowhere'.; allowed"),
    ({"dataset_dir": "nowhere"}, "`dataset_dir` is 'nowhere'; allowed: a folder with a dataset_info.json"),
    ({"cutoff_len": 1}, "'helpful', none of whose first 200 records gives a token to learn at cutoff_len 1"),
]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("change", "message"), CASES, ids=[str(change) for change, _ in CASES])
def test_wrong_option_is_refused(base_args, change, message):
    if "use_hyper_parallel" in change:
        need_llamafactory("0.9.5")
    with pytest.raises(ValueError, match=message):
        run_here({**base_args, **OGPSA, **change})


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("words", [["--ogpsa_sope", "inputs"], ["--ogpsa-sope=inputs"], ["ogpsa_sope=inputs"]])
def test_a_misspelt_option_is_refused_where_llamafactory_ignores_it(monkeypatch, words):
    from llamafactory.hparams.parser import get_train_args

    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    with pytest.raises(ValueError, match="`ogpsa_sope` is given.*did you mean `ogpsa_scope`"):
        get_train_args(["--stage", "ogpsa_sft", "--output_dir", "out", *words])


@pytest.mark.usefixtures("no_model")
def test_triton_is_refused_where_it_cannot_run(base_args, monkeypatch):
    from llamafactory_ogpsa.kernels import triton_kernels

    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match="`ogpsa_kernel` is 'triton', but Triton needs a CUDA or ROCm device"):
        run_here({**base_args, **OGPSA, "ogpsa_kernel": "triton"})


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("variable", "backend"),
    [("USE_MCA", "Megatron"), ("USE_MEGATRON_BRIDGE", "Megatron Bridge"), ("USE_KT", "KTransformers")],
)
@pytest.mark.parametrize(
    ("change", "named"),
    [(OGPSA, "`stage: ogpsa_sft`, `ogpsa_dataset`"), ({"ogpsa_dataset": "helpful"}, "`ogpsa_dataset`")],
    ids=["stage", "option"],
)
def test_other_backends_are_refused(base_args, monkeypatch, variable, backend, change, named):
    monkeypatch.setenv(variable, "1")
    message = f"`{variable}` is set: OGPSA does not support the {backend} backend; allowed: unset, or .* {named}"
    with pytest.raises(ValueError, match=message):
        run_here({**base_args, **change})


@pytest.mark.parametrize(
    ("arguments", "asking"),
    [
        ({"stage": "sft", "ogpsa_rank": None, "dataset": "ogpsa_sft"}, []),
        ({"stage": "ogpsa_sft", "ogpsa_rank": 2}, ["stage: ogpsa_sft", "ogpsa_rank"]),
        (["--stage", "ogpsa_dpo", "--ogpsa-rank=2"], ["stage: ogpsa_dpo", "ogpsa_rank"]),
        (["--dataset", "ogpsa_sft", "stage=sft", "finetuning_type=ogpsa_lora"], ["finetuning_type: ogpsa_lora"]),
        (["--stage", "sft", "--do_train"], []),
        ({"stage": "ogpsa_stf", "finetuning_type": "ogpsa"}, ["stage: ogpsa_stf", "finetuning_type: ogpsa"]),
        ([], []),
    ],
)
def test_what_asks_for_ogpsa_is_found_in_a_file_and_on_the_command_line(arguments, asking):
    from llamafactory_ogpsa.plugin.backends import ogpsa_options

    assert ogpsa_options(arguments) == asking


@pytest.mark.usefixtures("no_model")
def test_use_kt_is_refused_before_llamafactory_looks_for_its_packages(base_args):
    with pytest.raises(ValueError, match="`use_kt` is True: OGPSA does not support the KTransformers backend"):
        run_here({**base_args, **OGPSA, "use_kt": True})


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("records", "entry"),
    [
        ('[{"instruction": "p", "input": "", "output": null}]', {}),
        (
            '[{"conversations": [{"from": "i", "value": "p"}, {"from": "you", "value": "a"}]}]',
            {"formatting": "sharegpt"},
        ),
        ("[]", {}),
        ("", {}),
    ],
    ids=["no answer", "other tags", "empty list", "empty file"],
)
def test_a_set_without_a_usable_record_is_refused_with_the_likely_causes(
    base_args, data_dir, tmp_path, records, entry
):
    broken = tmp_path / "data"
    shutil.copytree(data_dir, broken)
    info = json.loads((broken / "dataset_info.json").read_text())
    (broken / "odd.json").write_text(records)
    info["odd"] = {"file_name": "odd.json", **entry}
    (broken / "dataset_info.json").write_text(json.dumps(info))
    args = {**base_args, **OGPSA, "dataset_dir": str(broken), "ogpsa_dataset": "helpful,odd"}
    with pytest.raises(ValueError, match="`ogpsa_dataset` has 'odd', none of whose.*Likely causes: .*`cutoff_len`"):
        run_here(args)


@pytest.fixture
def no_training_set(monkeypatch):
    """Fail the test if the training set is read; the reference sets may be."""
    from llamafactory.data import loader

    stock = loader._load_single_dataset

    def load(dataset_attr, *args):
        assert not str(dataset_attr).startswith("safety"), "the training set was read"
        return stock(dataset_attr, *args)

    monkeypatch.setattr(loader, "_load_single_dataset", load)


@pytest.mark.usefixtures("no_model", "no_training_set")
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"file_name": "gone.json"},
            "'odd', whose `file_name` in dataset_info.json is 'gone.json', but .*/gone.json is",
        ),
        ({"file_name": "hollow"}, "'odd', whose `file_name` .* is 'hollow', but .* is an empty folder"),
        (
            {"columns": {"prompt": "text"}},
            "'odd', whose entry in dataset_info.json does not say what to read; allowed",
        ),
        ("odd.json", "'odd', whose entry in dataset_info.json does not say what to read"),
        ({"file_name": "odd.json", "columns": {"prompt": "gone"}}, "'odd', which cannot be read .KeyError: 'gone'"),
        ({"file_name": "odd.json", "ranking": True}, "'odd', which is a ranking set"),
        ({"file_name": "odd.json"}, "'odd', none of whose first 200 records gives a token to learn"),
    ],
    ids=["no file", "empty folder", "no source", "no entry", "no column", "kind", "no answers"],
)
def test_what_is_wrong_with_a_reference_set_comes_before_the_training_set_is_read(
    base_args, data_dir, tmp_path, entry, message
):
    broken = tmp_path / "data"
    shutil.copytree(data_dir, broken)
    info = json.loads((broken / "dataset_info.json").read_text())
    (broken / "odd.json").write_text('[{"instruction": "p", "input": "", "output": null}]')
    (broken / "hollow").mkdir()
    (broken / "dataset_info.json").write_text(json.dumps({**info, "odd": entry}))
    with pytest.raises(ValueError, match=message):
        run_here({**base_args, **OGPSA, "dataset_dir": str(broken), "ogpsa_dataset": "helpful,odd"})


TEXT = {"stage": "ogpsa_pt", "dataset": "safety_text", "ogpsa_dataset": "helpful_text"}


@pytest.mark.usefixtures("no_model", "no_training_set")
def test_a_set_that_does_not_fill_a_packed_block_is_refused_with_the_remedies(base_args):
    remedies = "a larger `ogpsa_num_samples`.*, a smaller `cutoff_len`, or `packing: false`"
    message = f"'helpful_text', whose first 2 records do not fill one packed block of cutoff_len 250 .*{remedies}"
    with pytest.raises(ValueError, match=message):
        run_here({**base_args, **OGPSA, **TEXT, "ogpsa_num_samples": 2, "cutoff_len": 250})


ZERO = {"zero_optimization": {"stage": 2}}

DEEPSPEED_CASES = [
    ({}, "`zero_optimization.stage` of `deepspeed` is 0 under OGPSA; allowed: 1, 2, 3"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device.*'nvme'"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device.*'nvme'"),
    *[
        ({**ZERO, "optimizer": {"type": name}}, f"`optimizer.type` of `deepspeed` is '{name.lower()}'")
        for name in ("Muon", "OneBitAdam", "OneBitLamb", "ZeroOneAdam")
    ],
    (
        {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
        "grad_accum_dtype.*allowed: unset, or stage 2",
    ),
    (
        {**ZERO, "compile": {"deepcompile": True}},
        "`compile.deepcompile` of `deepspeed` is True.*allowed: False or unset",
    ),
    ({**ZERO, "tensor_parallel": {"autotp_size": 2}}, "`tensor_parallel.autotp_size` of `deepspeed` is 2"),
    ({**ZERO, "sequence_parallel_size": 2}, "`sequence_parallel_size` of `deepspeed` is 2"),
    ({**ZERO, "managed_gradient_accumulation": False}, "`managed_gradient_accumulation` of `deepspeed` is False"),
    ({**ZERO, "torch_autocast": {"enabled": True}}, "`torch_autocast.enabled` of `deepspeed` is True"),
    (
        {"zero_optimization": {"stage": 3, "mics_shard_size": 2}},
        "`zero_optimization.mics_shard_size` of `deepspeed` is 2",
    ),
    (
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
        "zero_hpz_partition_size` of `deepspeed` is 8",
    ),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 0.5}}}, "offload_optimizer.ratio` .* is 0.5"),
    (
        {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
        "`zero_optimization.zenflow` of `deepspeed`",
    ),
]


@pytest.mark.parametrize(("config", "message"), DEEPSPEED_CASES)
def test_deepspeed_configurations_without_an_engine_are_refused(config, message):
    from llamafactory_ogpsa.plugin.distributed import check_deepspeed

    check_deepspeed({"zero_optimization": {"stage": 3, "mics_shard_size": -1, "offload_optimizer": {"device": "cpu"}}})
    with pytest.raises(ValueError, match=message):
        check_deepspeed(config)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "`fsdp_version` is 1 under OGPSA; allowed: 2"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "`parallelism_config.tp_size` is 2"),
        ({"PARALLELISM_CONFIG_SP_SIZE": "4"}, "`parallelism_config.sp_size` is 4"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "`ACCELERATE_USE_MEGATRON_LM` is set"),
    ],
)
def test_launchers_without_an_engine_are_refused(monkeypatch, environment, message):
    from types import SimpleNamespace

    from llamafactory_ogpsa.plugin.distributed import check_distributed

    stock = SimpleNamespace(fsdp="", fsdp_config=None, deepspeed_plugin=None, parallelism_config=None)
    check_distributed(stock)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        check_distributed(stock)
