"""Every way of starting several processes loads the plugin in each."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import OGPSA, free_port, read_rows


pytestmark = pytest.mark.cli

RAY_WORKER = """
import sys
import ray
import yaml
from llamafactory.train.tuner import Worker

ray.init(num_cpus=1, include_dashboard=False)
environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
worker = ray.remote(Worker).options(num_cpus=1, runtime_env={"env_vars": environment}).remote()
config = {"args": yaml.safe_load(open(sys.argv[1])), "callbacks": []}
ray.get(worker._training_function.remote(config=config))
ray.shutdown()
"""


def start(command, config, **env):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, *command, str(config)],
        env={**os.environ, "PATH": path, "MASTER_ADDR": "127.0.0.1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(processes):
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output[-6000:]


@pytest.fixture
def config(base_args, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**base_args, **OGPSA, "ddp_backend": "gloo"}))
    return path


CLI = ["-m", "llamafactory.cli", "train"]


def test_two_nodes(base_args, config):
    together = {"FORCE_TORCHRUN": "1", "NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_PORT": free_port()}
    finish([start(CLI, config, NODE_RANK=rank, **together) for rank in "01"])
    assert len(read_rows(base_args["output_dir"])[0]) == 3


def test_an_elastic_launch(base_args, config):
    elastic = {"RDZV_ID": "7", "MIN_NNODES": "1", "MAX_NNODES": "2", "MAX_RESTARTS": "1", "NPROC_PER_NODE": "2"}
    finish([start(CLI, config, FORCE_TORCHRUN="1", MASTER_PORT=free_port(), **elastic)])
    assert len(read_rows(base_args["output_dir"])[0]) == 3


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_ray_worker(base_args, config, tmp_path):
    """LLaMA-Factory's own worker in a Ray process: USE_RAY=1 itself asks for ten CPUs a worker."""
    script = tmp_path / "ray_worker.py"
    script.write_text(RAY_WORKER)
    process = subprocess.run(
        [sys.executable, str(script), str(config), free_port()],
        env={**os.environ, "USE_RAY": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-6000:]
    assert len(read_rows(base_args["output_dir"])[0]) == 3
