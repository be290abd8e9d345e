"""The examples of the Python interface do what they say."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments


EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "python"


def run(name):
    process = subprocess.run([sys.executable, str(EXAMPLES / name)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def test_the_plain_loop_learns_and_keeps_the_references_lower():
    rows = {
        line[:22].strip(): [float(number) for number in line[22:].split()]
        for line in run("torch_loop.py").splitlines()[1:]
    }
    without, projected = rows["without projection"], rows["with projection"]
    assert projected[0] < rows["before"][0]
    assert projected[1] < without[1]
    assert projected[2] < without[2]


def test_the_trainer_projects_every_step():
    steps = re.findall(r"step (\d): removed (\S+), residual (\S+)", run("hf_trainer.py"))
    assert [int(step) for step, _, _ in steps] == list(range(1, 9))
    assert all(0 < float(removed) < 1 and float(residual) <= 1e-5 for _, removed, residual in steps)


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("hf_trainer", EXAMPLES / "hf_trainer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(example, folder, resume=None, **arguments):
    """Train the example's model for six steps with a refresh every four."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=16))
    arguments = dict(max_steps=6, use_cpu=True, report_to="none", disable_tqdm=True, **arguments)
    trainer = example.ProjectingTrainer(
        model, TrainingArguments(str(folder), **arguments), train_dataset=example.make_samples(64, 0, 32)
    )
    references = [example.make_samples(4, 32, 64), example.make_samples(4, 64, 96)]
    trainer.add_callback(example.RefreshCallback(trainer, references, interval=4))
    trainer.train(resume_from_checkpoint=resume)


def test_the_trainer_resumes_between_two_refreshes(example, tmp_path, capsys):
    train(example, tmp_path, save_steps=2)
    capsys.readouterr()
    train(example, tmp_path, resume=str(tmp_path / "checkpoint-2"), save_strategy="no")
    assert re.findall(r"step (\d): removed", capsys.readouterr().out) == ["3", "4", "5", "6"]


def test_the_trainer_projects_a_compiled_model(example, tmp_path, capsys):
    train(example, tmp_path, save_strategy="no", torch_compile=True, torch_compile_backend="eager")
    removed = re.findall(r"removed (\S+),", capsys.readouterr().out)
    assert len(removed) == 6
    assert all(float(share) > 0 for share in removed)
