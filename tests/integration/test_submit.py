"""A run as a job of a real cluster: what it needs travels with it, no secret does, and it stops with a checkpoint."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import ray
from helpers import steps_of, tiny_config, write_pairs
from prometheus_client.parser import text_string_to_metric_families
from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient
from typer.testing import CliRunner

from dpo_ray.cli import app
from dpo_ray.config import to_yaml
from dpo_ray.errors import ConfigError
from dpo_ray.orchestration.gauges import FAILURES, LINE
from dpo_ray.orchestration.submit import Jobs, _Log
from dpo_ray.training import manifest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
CANARY = "canary-7b1f3c"
LOSS = """
from dpo_ray.objective.losses import LossSpec
from torch.nn.functional import softplus


def steeper(stats):
    chosen, rejected = stats.pairwise(stats.log_ratios())
    return softplus(-2.0 * (chosen - rejected))


STEEPER = LossSpec(steeper, "of one's own")
"""


class Addresses(NamedTuple):
    """Of a cluster: its dashboard, and what Prometheus scrapes."""

    dashboard: str
    metrics: str

    def scrape(self, run: str) -> dict[str, float]:
        """The gauges of a run, by name and label, as Prometheus would get them."""
        text = urllib.request.urlopen(self.metrics, timeout=10).read().decode()
        samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
        own = [each for each in samples if each.labels.get("run") == run]
        return {f"{each.name}{each.labels.get('kind', '')}": each.value for each in own}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Addresses]:
    """A cluster; its commands are those of this environment."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        made = Cluster()
        # Else every cluster of a machine wants the same port for its agent.
        with socket.socket() as free:
            free.bind(("", 0))
            metrics = free.getsockname()[1]
        ports = {"dashboard_port": 0, "dashboard_agent_listen_port": 0, "metrics_export_port": metrics}
        head = made.add_node(num_cpus=6, include_dashboard=True, **ports)
        yield Addresses(f"http://{head.webui_url}", f"http://127.0.0.1:{metrics}/metrics")
        ray.shutdown()
        made.shutdown()


def check_gauges(found: dict[str, float], last: dict[str, float], ended: float) -> None:
    """What Prometheus gets of a run that has ended is its last line of metrics."""
    shown = {key: name for key, name in LINE.items() if key in last}
    assert {"loss", "rewards/margins", "grad_norm", "perf/mfu", "perf/data_wait_s"} < shown.keys()
    assert {key: found[f"ray_{name}"] for key, name in shown.items()} == {key: last[key] for key in shown}
    assert found["ray_dpo_checkpoint_step"] == found["ray_dpo_steps_planned"] == last["step"]
    for moment in ("step", "checkpoint"):
        assert ended - 120 < found[f"ray_dpo_last_{moment}_timestamp_seconds"] < ended
    assert [found[f"ray_dpo_failures{kind}"] for kind in FAILURES] == [0] * len(FAILURES)
    assert found["ray_dpo_loss_finite"] == found["ray_dpo_workers_max"] == 1
    assert found["ray_dpo_reference_pairs_left"] == 0 < found["ray_dpo_reference_pairs_scored"]


def check_logs(folder: Path) -> None:
    """Of each run's workers and replicas Ray's logs say whose a line is: as JSON, and in front of it."""
    found = set[tuple[str, int, int, str]]()
    for path in folder.glob("train/ray-train-app-worker-*.log"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        own = [each for each in lines if "dpo_run" in each]
        found |= {(each["dpo_run"], each["dpo_attempt"], each["dpo_rank"], each["message"]) for each in own}
    assert {
        ("short", 0, 0, "begins after step 0, one of 1 workers"),
        ("short", 0, 0, "the checkpoint of step 2 is committed"),
        ("short", 0, 0, "ended"),
        ("long", 0, 0, "asked to write a checkpoint and end: asked to stop (SIGTERM)"),
    } <= found
    told = [line for path in folder.glob("worker-*.err") for line in path.read_text().splitlines()]
    assert [line for line in told if " INFO run=short attempt=0 rank=0 dpo_ray.orchestration.worker: begins" in line]
    assert [line for line in told if " INFO run=short role=reference rank=0 dpo_ray.orchestration.repl" in line]


def test_a_job(cluster: Addresses, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dashboard = cluster.dashboard
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SOME_TOKEN"):
        monkeypatch.setenv(name, CANARY)
    (tmp_path / "losses_of_a_job.py").write_text(LOSS)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 60)
    options = {"objective": {"loss": "losses_of_a_job:STEEPER"}, "train": {"max_steps": 2, "eval_every_steps": None}}
    (tmp_path / "c.yaml").write_text(to_yaml(tiny_config(str(tmp_path / "s"), "short", tiny_model, pairs, **options)))
    done = CliRunner().invoke(app, ["submit", "c.yaml", "--address", dashboard, "--command", "prepare"])
    assert done.exit_code == 0, done.output
    assert list((tmp_path / "s" / "store" / "pairs").glob("*/manifest.json"))
    assert not (tmp_path / "s" / "short" / "metrics.jsonl").exists()
    done = CliRunner().invoke(app, ["submit", "c.yaml", "--address", dashboard])
    assert done.exit_code == 0, done.output
    assert "2 steps done" in done.output
    assert re.search(r"job short-\d+-\d+: succeeded", done.output)
    lines = steps_of(tmp_path / "s" / "short")
    assert len(lines) == 2
    check_gauges(cluster.scrape("short"), lines[-1], time.time())

    long = ["--set", "name=long", "--set", "train.max_steps=100000", "--set", "train.epochs=100000"]
    long += ["--set", "train.checkpoint_every_steps=100000"]
    begun = CliRunner().invoke(app, ["submit", "c.yaml", "--address", dashboard, "--detach", *long])
    found = re.search(r"job    (long-\S+)", begun.output)
    assert found, begun.output
    ledger = tmp_path / "s" / "long" / "ledger.jsonl"
    deadline = time.monotonic() + 120
    while not (ledger.exists() and ledger.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    stopped = CliRunner().invoke(app, ["submit", "--stop", found[1], "--address", dashboard])
    assert stopped.exit_code == 143, stopped.output
    assert "writing a checkpoint after this step" in stopped.output
    newest = manifest.newest(str(tmp_path / "s" / "long"))
    assert newest is not None
    assert f"its newest checkpoint is of step {newest[1].state.step}" in stopped.output
    shown = CliRunner().invoke(app, ["submit", "--status", found[1], "--address", dashboard])
    assert "stopped" in shown.output

    # A finished run is gone from there: no alert can be about it.
    deadline = time.monotonic() + 60
    while cluster.scrape("short"):
        assert time.monotonic() < deadline
        time.sleep(0.5)

    session = Path("/tmp/ray/session_latest").resolve()
    check_logs(session / "logs")

    # The environment of this machine has gone nowhere.
    told = done.output + begun.output + stopped.output + shown.output
    jobs = json.dumps([each.model_dump(mode="json") for each in JobSubmissionClient(dashboard).list_jobs()])
    assert CANARY not in told + jobs
    assert "RAY_JOB_STOP_WAIT_TIME_S" in jobs
    grep = subprocess.run(["grep", "-rl", CANARY, str(session / "logs"), str(tmp_path / "s")], capture_output=True)
    assert grep.stdout == b""
    with pytest.raises(ConfigError, match="the cluster refuses: .*nobody"):
        Jobs(dashboard).job("nobody")


def test_no_cluster() -> None:
    with pytest.raises(ConfigError, match="--address is '127.0.0.1:8265': write http://127.0.0.1:8265"):
        Jobs("127.0.0.1:8265")
    with pytest.raises(ConfigError, match="no Ray dashboard answers: .* give --address"):
        Jobs("http://127.0.0.1:9")


def test_a_log_is_written_once_over_several_connections() -> None:
    written = list[str]()
    log = _Log(written.append)
    for parts in (["abc", "def"], ["ab", "cdefg"], ["abcdefgh"], ["abcdefgh", "i"]):
        log.begins()
        for part in parts:
            log.add(part)
    assert "".join(written) == "abcdefghi"
    assert all(written)


def test_one_thing_at_a_time() -> None:
    for arguments in ([], ["c.yaml", "--stop", "x"], ["--status", "a", "--stop", "b"], ["--stop", "a", "--detach"]):
        done = CliRunner().invoke(app, ["submit", *arguments])
        assert isinstance(done.exception, ConfigError), arguments
