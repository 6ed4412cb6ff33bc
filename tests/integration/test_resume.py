"""A driver killed in the middle, and the same command given again: as if nothing had happened."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import dpo_ray_command, read_lines, steps_of, tiny_config, write_pairs
from typer.testing import CliRunner

from dpo_ray import train
from dpo_ray.cli import app
from dpo_ray.config import to_yaml

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def start(config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from dpo_ray.cli import main; main()", "train", str(config)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def kill_with_all_it_started(process: subprocess.Popen[bytes]) -> None:
    """The driver first, then at once its Ray processes: left alone, these would train on for some seconds."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def finish(process: subprocess.Popen[bytes]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    return output.decode()


def test_kill_the_driver(tmp_path: Path, tiny_model: Path, local_ray: None) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 200)
    undisturbed, killed = (
        tiny_config(str(tmp_path), name, tiny_model, pairs, scaling={"workers": 2}, train={"epochs": 2})
        for name in ("undisturbed", "killed")
    )
    file = tmp_path / "killed.yaml"
    file.write_text(to_yaml(killed))
    train(undisturbed)

    process = start(file)
    manifest = tmp_path / "killed" / "checkpoints" / "step-00000005" / "manifest.json"
    deadline = time.monotonic() + 240
    while not manifest.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    kill_with_all_it_started(process)
    assert manifest.exists()
    assert not (tmp_path / "killed" / "export" / "exported.json").exists()

    finish(start(file))
    expected, found = steps_of(tmp_path / "undisturbed"), steps_of(tmp_path / "killed")
    assert [line["step"] for line in found] == list(range(1, 21))
    for name in ("loss", "grad_norm", "rewards/margins", "num_tokens", "learning_rate"):
        assert [line[name] for line in found] == [line[name] for line in expected], name
    digests = [
        [entry["digest"] for entry in read_lines(tmp_path / run / "ledger.jsonl")] for run in ("undisturbed", "killed")
    ]
    assert digests[0] == digests[1]
    attempts = read_lines(tmp_path / "killed" / "attempts.jsonl")
    assert [attempt["position"] for attempt in attempts][0] == 0
    assert attempts[-1]["position"] in (5, 10, 15)
    assert attempts[-1]["checkpoint"] == f"step-{attempts[-1]['position']:08d}"
    weights = [(tmp_path / run / "export" / "model.safetensors").read_bytes() for run in ("undisturbed", "killed")]
    assert weights[0] == weights[1]

    assert "nothing to do" in CliRunner().invoke(app, ["train", str(file)]).output
    file.write_text(file.read_text().replace("beta: 0.1", "beta: 0.2"))
    refused = dpo_ray_command("train", str(file))
    assert refused.returncode == 2
    assert "objective.beta: 0.1 -> 0.2" in refused.stderr
    assert "Traceback" not in refused.stderr
