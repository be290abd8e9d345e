"""A multimodal model with text-only reference sets: a tiny Qwen2-VL with its processor, made on the spot."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import OGPSA, WORDS, make_records, make_tokenizer, read_rows, run_here


MEDIA_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


@pytest.fixture(scope="module")
def vision_model_dir(tmp_path_factory):
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = make_tokenizer(WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": MEDIA_TOKENS})
    names = ["vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"]
    tokens = dict(zip(names, tokenizer.convert_tokens_to_ids(MEDIA_TOKENS[2:]), strict=True))
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]},
        "tie_word_embeddings": True,
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    path = tmp_path_factory.mktemp("vision_model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2VLForConditionalGeneration(config).save_pretrained(path)
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    Qwen2VLProcessor(
        image_processor=images, tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor()
    ).save_pretrained(path)
    return str(path)


@pytest.fixture
def vision_args(base_args, vision_model_dir, tmp_path):
    """An OGPSA run whose training set has images and whose reference set has none."""
    from PIL import Image

    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (56, 56), (200, 20, 20)).save(data / "red.png")
    records = make_records(0, 24)
    for record in records:
        record |= {"instruction": f"<image>{record['instruction']}", "images": ["red.png"]}
    (data / "seen.json").write_text(json.dumps(records))
    (data / "helpful.json").write_text(json.dumps(make_records(1, 13)))
    columns = {"prompt": "instruction", "query": "input", "response": "output", "images": "images"}
    info = {"seen": {"file_name": "seen.json", "columns": columns}, "helpful": {"file_name": "helpful.json"}}
    (data / "dataset_info.json").write_text(json.dumps(info))
    return {
        **base_args,
        **OGPSA,
        "model_name_or_path": vision_model_dir,
        "template": "qwen2_vl",
        "dataset_dir": str(data),
        "media_dir": str(data),
        "dataset": "seen",
        "ogpsa_dataset": "helpful",
        "ogpsa_update_interval": 1,
        "cutoff_len": 128,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
    }


def test_text_in_a_packed_multimodal_run_has_the_loss_that_it_has_unpacked(vision_args, tmp_path):
    losses = {}
    for packing in (True, False):
        output = str(tmp_path / f"packing-{packing}")
        run_here({**vision_args, "neat_packing": packing, "output_dir": output})
        steps, refreshes = read_rows(output)
        assert [row["step"] for row in refreshes] == [0, 1]
        assert all(row["removed"] > 0 and row["residual"] < 1e-5 for row in steps)
        losses[packing] = refreshes[0]["reference_loss"]["helpful"]
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)


@pytest.mark.parametrize(
    ("stage", "packing", "neat", "image_token", "flash_attn", "scope", "packed"),
    [
        ("sft", True, True, None, "auto", "parameter", True),
        ("sft", True, True, "<image>", "auto", "parameter", False),
        ("sft", True, True, "<image>", "fa2", "parameter", True),
        ("sft", True, False, "<image>", "auto", "parameter", True),
        ("pt", True, False, None, "auto", "parameter", True),
        ("pt", False, False, None, "auto", "parameter", False),
        ("dpo", True, False, None, "auto", "parameter", False),
        ("kto", True, False, None, "auto", "parameter", False),
        ("sft", True, False, None, "auto", "inputs", False),
        ("sft", True, True, None, "auto", "inputs", False),
        ("sft", True, True, None, "fa2", "inputs", True),
        ("pt", True, False, None, "auto", "inputs", False),
    ],
)
def test_which_reference_sets_are_packed(stage, packing, neat, image_token, flash_attn, scope, packed):
    from llamafactory_ogpsa.plugin.datasets import packs_reference_sets

    data_args = SimpleNamespace(packing=packing, neat_packing=neat)
    template = SimpleNamespace(mm_plugin=SimpleNamespace(image_token=image_token, audio_token=None))
    model_args = SimpleNamespace(flash_attn=flash_attn)
    assert packs_reference_sets(stage, data_args, model_args, template, scope) is packed


@pytest.mark.usefixtures("no_model")
def test_flash_attention_2_with_packed_text_is_refused_before_the_model_is_loaded(vision_args):
    message = (
        "`neat_packing` is True with FlashAttention 2, and 'helpful' of `ogpsa_dataset`.*allowed: `neat_packing: f"
    )
    with pytest.raises(ValueError, match=message):
        run_here({**vision_args, "neat_packing": True, "flash_attn": "fa2"})
