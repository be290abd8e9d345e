"""What the tests share: a tiny model and tiny datasets made on the spot, and two ways to run LLaMA-Factory on them."""

import json
import logging
import os
import random
import socket
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from packaging.version import Version


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")
if not torch.cuda.is_available():
    # Before anything imports Triton: it decides at its import whether kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

# The files that take longest, which are begun first: at the end no core waits for the other.
LONGEST = [
    "distributed/test_processes.py",
    "webui/test_browser.py",
    "distributed/test_resume_processes.py",
    "test_lab.py",
    "plugin/test_resume.py",
    "distributed/test_fsdp.py",
    "distributed/test_launch.py",
    "distributed/test_zero_engines.py",
    "webui/test_runner.py",
]


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u")]


def make_tokenizer(words):
    """Build a word-level tokenizer with the special tokens of a chat model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<unk>", "<s>", "</s>", "Human", "Assistant", ":"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*specials, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def make_model_dir(path, words=WORDS, tie=True, family=None, **config):
    """Save a random tiny model with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
    from transformers.models.auto import tokenization_auto

    # transformers 5.8 reads every tokenizer of a Qwen2 as Qwen2's own, and has no words of this one then.
    own = "qwen2" in getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", ())
    family = family or ("llama" if own else "qwen2")
    tokenizer = make_tokenizer(words)
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[family]
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tie,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config_class(**{**settings, **config}))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session", autouse=True)
def torch_extensions(tmp_path_factory):
    """Let DeepSpeed compile into a folder of this session's own.

    The shared one in the user's cache is locked by a file, which a killed run leaves behind: all later runs wait for
    it, without end and without a word.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("torch_extensions")))
        yield


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return make_model_dir(tmp_path_factory.mktemp("model"))


def sentence(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def make_records(seed, count, kind="alpaca"):
    """Make records of random words, of different lengths, in the formats of dataset_info.json."""
    rng = random.Random(seed)
    records = []
    for index in range(count):
        prompt, answer, other = sentence(rng, 2, 9), sentence(rng, 1, 9), sentence(rng, 1, 9)
        if kind == "alpaca":
            records.append({"instruction": prompt, "input": "", "output": answer})
        elif kind == "ranking":
            records.append({"instruction": prompt, "input": "", "chosen": answer, "rejected": other})
        elif kind == "kto":
            records.append({"instruction": prompt, "input": "", "output": answer, "label": index % 3 != 0})
        elif kind == "text":
            records.append({"text": f"{prompt} {answer} {other}"})
    return records


RANKING_COLUMNS = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
KTO_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "label"}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A dataset_dir with a safety set and two reference sets of every kind."""
    path = tmp_path_factory.mktemp("data")
    info = {}
    for seed, (name, count) in enumerate([("safety", 24), ("helpful", 13), ("truthful", 10)]):
        for suffix, kind in [("", "alpaca"), ("_pairs", "ranking"), ("_kto", "kto"), ("_text", "text")]:
            (path / f"{name}{suffix}.json").write_text(json.dumps(make_records(seed, count, kind)))
            info[name + suffix] = {"file_name": f"{name}{suffix}.json"}
        info[f"{name}_pairs"] |= {"ranking": True, "columns": RANKING_COLUMNS}
        info[f"{name}_kto"]["columns"] = KTO_COLUMNS
        info[f"{name}_text"]["columns"] = {"prompt": "text"}
    info["helpful_again"] = info["helpful"]
    info["helpful_odd"] = {**info["helpful"], "columns": {"prompt": "nowhere"}}
    (path / "dataset_info.json").write_text(json.dumps(info))
    return str(path)


@pytest.fixture
def base_args(model_dir, data_dir, tmp_path):
    """A stock SFT run of three steps; tests change what they are about."""
    return {
        "model_name_or_path": model_dir,
        "template": "default",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": data_dir,
        "dataset": "safety",
        "cutoff_len": 64,
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 7,
        "overwrite_cache": True,
    }


@pytest.fixture
def no_model(monkeypatch):
    """Fail the test if a model is loaded."""

    def load_model(*args, **kwargs):
        raise AssertionError("the model was loaded")

    for stage in ("pt", "sft", "rm", "dpo", "kto"):
        monkeypatch.setattr(f"llamafactory.train.{stage}.workflow.load_model", load_model)


@pytest.fixture(scope="session")
def site_without_plugin(tmp_path_factory):
    """A folder with every installed package but this one, for `python -S` with PYTHONPATH."""
    site = tmp_path_factory.mktemp("site")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "llamafactory_ogpsa" not in entry.name.lower() and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    look = "import importlib.util as u, sys; sys.exit(u.find_spec('llamafactory_ogpsa') is not None)"
    subprocess.run(
        [sys.executable, "-S", "-c", look], env={**os.environ, "PYTHONPATH": str(site)}, cwd=site, check=True
    )
    return str(site)


@pytest.fixture
def cpu_scaler(monkeypatch):
    """Let fp16 runs have a gradient scaler, which accelerate makes on accelerators only."""
    from accelerate import Accelerator

    prepare = Accelerator.prepare

    def prepare_with_scaler(self, *args, **kwargs):
        if self.mixed_precision == "fp16":
            self.native_amp = True
            self.scaler = self.scaler or torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "prepare", prepare_with_scaler)


@pytest.fixture
def said(caplog, monkeypatch):
    """Return what OGPSA has logged so far, by a function."""
    logger = logging.getLogger("llamafactory.ogpsa")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)  # or the root logger's handler, which is the same, has it again
    monkeypatch.setattr(logger, "level", logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if record.name == logger.name]


OGPSA = {"stage": "ogpsa_sft", "ogpsa_dataset": "helpful,truthful", "ogpsa_update_interval": 2}


def need_llamafactory(minimum):
    """Skip the test with a LLaMA-Factory that is older."""
    if Version(version("llamafactory")).release < Version(minimum).release:
        pytest.skip(f"LLaMA-Factory offers this from {minimum} on")


def run_cli(args, tmp_path, env=None, **kwargs):
    """Run `llamafactory-cli train` on a YAML made of `args`; see `cli`."""
    config = Path(tmp_path) / "config.yaml"
    config.write_text(yaml.safe_dump(args))
    return cli("train", str(config), env=env, **kwargs)


def cli(*words, env=None, python=(), check=True):
    """Run `llamafactory-cli`; return the finished process, or fail the test with what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.run(
        [sys.executable, *python, "-m", "llamafactory.cli", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, **(env or {})},
    )
    if check and process.returncode != 0:
        raise AssertionError(f"exit {process.returncode}\n{process.stdout[-3000:]}\n{process.stderr[-6000:]}")
    return process


def run_here(args, **callbacks):
    """Run the same in this process, which saves ten seconds of imports."""
    from llamafactory.train.tuner import run_exp

    run_exp(dict(args), **callbacks)


def free_port():
    """Return a port of this machine that nothing listens on, as a string."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def read_rows(output_dir):
    """Read ogpsa_log.jsonl: the logged steps and the refreshes."""
    rows = [json.loads(line) for line in (Path(output_dir) / "ogpsa_log.jsonl").read_text().splitlines()]
    return [row for row in rows if not row.get("refresh")], [row for row in rows if row.get("refresh")]


def load_weights(output_dir):
    """Load the saved weights (full model or adapter) by name."""
    from safetensors.torch import load_file

    weights = {}
    for file in sorted(Path(output_dir).glob("*.safetensors")):
        weights.update(load_file(file))
    assert weights, f"no weights in {output_dir}"
    return weights


def rows_of(output_dir):
    """Return the rows of the log, but for the time that refreshes took."""
    steps, refreshes = read_rows(output_dir)
    assert all(row.pop("seconds") > 0 for row in refreshes)
    return steps, refreshes


def same_weights(one, other):
    """Compare the final weights of two runs, bit by bit."""
    one, other = load_weights(one), load_weights(other)
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def assert_same_run(one, other):
    """Check that two runs ended with the same bits and wrote the same rows."""
    assert same_weights(one, other)
    assert rows_of(one) == rows_of(other)
