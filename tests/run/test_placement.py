"""What follows from the options for the machines of a run."""

import logging
from types import SimpleNamespace

import pytest
import torch

from llamafactory_ogpsa.run import placement


@pytest.mark.parametrize(
    ("kernel", "obstacle", "hosted", "obstructed", "expected"),
    [
        ("auto", None, 0, 0, ("meta", "auto")),
        ("auto", None, 1, 0, ("cpu", "auto")),
        ("auto", None, 0, 1, ("meta", "torch")),
        ("auto", "Triton is not installed", 0, 0, ("meta", "torch")),
        ("triton", "Triton is not installed", 0, 0, ("meta", "triton")),  # which is refused elsewhere
    ],
)
def test_what_one_process_cannot_do_none_does(monkeypatch, caplog, kernel, obstacle, hosted, obstructed, expected):
    monkeypatch.setattr(placement, "triton_obstacle", lambda device_type, interpret: obstacle)
    processes = SimpleNamespace(rank=0, totals=lambda mine: [mine[0] + hosted, mine[1] + obstructed])
    engine = SimpleNamespace(device=torch.device("meta"), processes=processes)
    with caplog.at_level(logging.INFO):
        device, chosen = placement.settle_placement(engine, torch.device("meta"), kernel)
    assert (device.type, chosen) == expected
    assert ("cannot run in every process" in caplog.text) == bool(obstructed)
    assert ("by torch: Triton is not installed" in caplog.text) == (chosen == "torch" and obstacle is not None)
