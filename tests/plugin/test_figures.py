"""What a run tells: the log, the trackers, the plot, the line at the start, the progress bar."""

import json
import shutil

import pytest
from conftest import OGPSA, cli, load_weights, read_rows, run_here

from llamafactory_ogpsa.run.log import append_row, begin_log, read_log
from llamafactory_ogpsa.run.plot import plot_log


@pytest.mark.cli
def test_a_run_through_the_command_line_tells_everything(base_args, tmp_path):
    args = {**base_args, **OGPSA, "max_steps": 5, "logging_steps": 2, "plot_loss": True, "ogpsa_refresh_samples": 8}
    process = cli("train", *(f"--{key}={value}" for key, value in args.items()))
    steps, refreshes = read_rows(args["output_dir"])
    assert [row["step"] for row in steps] == [2, 4]
    assert [row["step"] for row in refreshes] == [0, 2, 4]
    assert all(row["rank"] == 2 and row["seconds"] > 0 for row in refreshes)
    for key in ("cosine", "projected_cosine"):
        assert all(set(row[key]) == {"helpful", "truthful"} for row in steps)

    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    first = next(row for row in history if row["step"] == 2)
    assert first["ogpsa/removed"] == steps[0]["removed"]
    assert first["ogpsa/residual"] == steps[0]["residual"]
    assert first["ogpsa/reference_loss/helpful"] == refreshes[0]["reference_loss"]["helpful"]
    assert (tmp_path / "out" / "training_ogpsa.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    weights = load_weights(base_args["model_name_or_path"]).values()
    text = process.stdout + process.stderr
    for fact in (
        "OGPSA is on: reference sets helpful (8 samples), truthful (8 samples)",
        "every K = 2 steps",
        "rank 2",
        "scope parameter",
        "method orthogonal",
        f"{sum(tensor.numel() for tensor in weights):,} trainable parameters in {len(weights)} tensors",
        "basis 0.2 MiB on cpu",
        "expected cost 2.40 reference samples per training sample",
        "OGPSA refresh",
    ):
        assert fact in text


def test_the_reference_sets_are_tokenised_once(base_args, monkeypatch):
    from llamafactory.train.sft import workflow

    names, stock = [], workflow.get_dataset

    def counting(template, model_args, data_args, training_args, stage, tokenizer, processor=None):
        names.extend(data_args.dataset)
        return stock(template, model_args, data_args, training_args, stage, tokenizer, processor)

    monkeypatch.setattr(workflow, "get_dataset", counting)
    run_here({**base_args, **OGPSA, "ogpsa_update_interval": 1})
    assert names == [
        "helpful",
        "truthful",
        "safety",
    ]  # the reference sets first: what is wrong with them is found early


def test_only_the_first_samples_are_used(base_args, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    path = tmp_path / "data" / "helpful.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:3]))
    losses = []
    for change in ({"ogpsa_num_samples": 3}, {"dataset_dir": str(tmp_path / "data")}, {}):
        args = {**base_args, **OGPSA, "ogpsa_dataset": "helpful", "max_steps": 1, **change}
        args["output_dir"] = f"{base_args['output_dir']}-{len(losses)}"
        run_here(args)
        losses.append(read_rows(args["output_dir"])[1][0]["reference_loss"]["helpful"])
    assert losses[0] == losses[1] != losses[2]


def test_epoch_logging_measures_every_logged_step(base_args):
    args = {**base_args, **OGPSA, "logging_strategy": "epoch", "max_steps": 8}
    run_here(args)
    steps, _ = read_rows(args["output_dir"])
    assert [row["step"] for row in steps] == [6, 8]
    assert all(row["residual"] is not None for row in steps)


def test_a_plot_that_fails_does_not_cost_the_weights(base_args, monkeypatch):
    from llamafactory_ogpsa.run import run

    def plot_log(*args):
        raise OSError("no space left")

    monkeypatch.setattr(run, "plot_log", plot_log)
    run_here({**base_args, **OGPSA, "plot_loss": True})
    assert load_weights(base_args["output_dir"])


def test_equal_sets_give_rank_one_and_the_batch_size_does_not_matter(base_args):
    rows = []
    for batch_size in (1, 5, 64):
        out = f"{base_args['output_dir']}{batch_size}"
        run_here(
            {
                **base_args,
                **OGPSA,
                "ogpsa_dataset": "helpful,helpful_again",
                "ogpsa_batch_size": batch_size,
                "output_dir": out,
            }
        )
        steps, refreshes = read_rows(out)
        assert all(row["rank"] == 1 for row in refreshes)
        rows.append((steps, refreshes))
    for steps, refreshes in rows[1:]:
        for row, first in zip(steps, rows[0][0], strict=True):
            assert row["removed"] == pytest.approx(first["removed"], rel=1e-4)
        for row, first in zip(refreshes, rows[0][1], strict=True):
            assert row["reference_loss"] == pytest.approx(first["reference_loss"], rel=1e-5)


def test_a_gradient_that_is_not_finite_is_reported(base_args):
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        """Makes one weight inf after the first step: every later gradient is NaN."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                next(model.parameters()).data[0, 0] = float("inf")

    args = {**base_args, **OGPSA, "ogpsa_update_interval": 100}
    run_here(args, callbacks=[Poison()])
    steps, _ = read_rows(args["output_dir"])
    assert [row.get("non_finite_steps", 0) for row in steps] == [0, 1, 1]
    assert [row["removed"] is None for row in steps] == [False, True, True]


def test_a_log_that_is_resumed_has_every_row_once(tmp_path):
    path = str(tmp_path / "log.jsonl")
    begin_log(path, 0)
    for step in range(6):
        if step % 2 == 0:
            append_row(path, {"step": step, "refresh": True, "reference_loss": {"a": 1.0 + step}})
        append_row(path, {"step": step + 1, "removed": 0.1 * step})
    with open(path, "a") as f:
        f.write('{"step": 7, "remo')
    whole = read_log(path)
    assert len(whole) == 9
    begin_log(path, 4)
    kept = read_log(path)
    assert kept == [row for row in whole if row["step"] < 4 or (row["step"] == 4 and "removed" in row)]
    assert not (tmp_path / "log.jsonl.tmp").exists()
    begin_log(path, 0)
    assert read_log(path) == []
    assert not plot_log(path, str(tmp_path / "empty.png"))

    (tmp_path / "odd.jsonl").write_text("{}\nnot json\n{}\n")
    with pytest.raises(ValueError, match=r"odd.jsonl, line 2, is not JSON"):
        read_log(str(tmp_path / "odd.jsonl"))
