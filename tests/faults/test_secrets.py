"""A canary in every place where a secret can enter a cluster, and a look for each into everything that comes out."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import S3Server
from helpers import JudgeServer, tiny_config, write_pairs

from dpo_ray import storage
from dpo_ray.config import to_yaml

pytestmark = [
    pytest.mark.faults,
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.trackers,
    pytest.mark.timeout(600),
]
READY_S = 60.0
# How often command lines are looked at, and the much longer answers of the dashboard.
LOOK_S, ASK_S = 0.5, 5.0
# What a cluster tells of its processes, jobs and environments.
TOLD = (
    "/api/jobs/",
    *(
        f"/api/v0/{what}?detail=1"
        for what in ("actors", "jobs", "nodes", "placement_groups", "workers", "tasks", "objects", "runtime_envs")
    ),
    *("/api/v0/cluster_metadata", "/api/v0/cluster_events", "/api/v0/tasks/timeline", "/api/cluster_status"),
    *("/nodes/NODE", "/nodes?view=summary", "/logical/actors", "/events", "/api/component_activities"),
    *("/api/prometheus/sd", "/usage_stats_enabled"),
)
# A loss that fails as a library does that was redirected to a signed URL, or that shows what it was given.
LOSS = """
import os
from dpo_ray.objective.losses import LossSpec


def leaks(stats):
    try:
        raise OSError(os.environ["BLOB"] + ": no answer")
    except OSError as error:
        raise ValueError("no model for " + os.environ["HF_TOKEN"]) from error


LEAKS = LossSpec(leaks, "none")
"""


class Canaries:
    """Secrets by where they enter; each is a word of its own."""

    def __init__(self) -> None:
        self.by_place: dict[str, str] = {}

    def new(self, place: str, num_bytes: int = 20) -> str:
        """One more."""
        return self.by_place.setdefault(place, secrets.token_hex(num_bytes))

    def found_in(self, outputs: dict[str, bytes]) -> set[tuple[str, str]]:
        """Which stand where."""
        return {
            (place, output)
            for place, canary in self.by_place.items()
            for output, content in outputs.items()
            if canary.encode() in content
        }


class Cluster:
    """A head with a dashboard in an environment of its own, and what can be seen of it while it runs."""

    def __init__(self, environment: dict[str, str], folder: Path, token: str) -> None:
        self.folder, self._token, self._node, self.seen = folder, token, "", dict[str, bytes]()
        with contextlib.ExitStack() as held:
            ports = [held.enter_context(socket.socket()) for _ in range(6)]
            for port in ports:
                port.bind(("127.0.0.1", 0))
            gcs, dashboard, agent, metrics, client, grpc = (port.getsockname()[1] for port in ports)
        self.address, self.dashboard = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        self._process = subprocess.Popen(
            ["ray", "start", "--head", "--block", "--num-cpus=6", "--disable-usage-stats"]
            + [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
            + [f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}"]
            + [f"--dashboard-agent-grpc-port={grpc}", f"--temp-dir={folder}", "--node-ip-address=127.0.0.1"],
            env=environment,
            stdout=(folder / "ray-start.txt").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch)

    def __enter__(self) -> Cluster:
        deadline = time.monotonic() + READY_S
        while not (found := re.search(rb'"node_id": "(\w+)"', self._tells("/api/v0/nodes"))):
            assert self._process.poll() is None, (self.folder / "ray-start.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        self._node = found[1].decode()
        self._watching.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._over.set()
        self._watching.join()
        started = psutil.Process(self._process.pid).children(recursive=True)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _watch(self) -> None:
        """What others see: command lines, and what the dashboard tells."""
        asked = 0.0
        while not self._over.wait(LOOK_S):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    self.seen[f"command line of {process.pid}"] = " ".join(process.cmdline()).encode()
            if time.monotonic() - asked > ASK_S:
                self.seen |= {path: self.seen.get(path, b"") + self._tells(path) for path in TOLD}
                asked = time.monotonic()

    def _tells(self, path: str) -> bytes:
        request = urllib.request.Request(
            self.dashboard + path.replace("NODE", self._node), headers={"Authorization": f"Bearer {self._token}"}
        )
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=10) as answer:
            content: bytes = answer.read()
            return content
        return b""


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets lie in it, whose paths may not be long."""
    folder = Path(tempfile.mkdtemp(prefix="canary-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def plant(canaries: Canaries, home: Path, hidden: dict[str, str]) -> dict[str, str]:
    """The environment of a node in which each place for a secret has one; credentials of the storage are in a file."""
    (home / ".aws").mkdir(parents=True)
    canaries.by_place |= {"~/.aws/credentials: key": hidden["AWS_ACCESS_KEY_ID"]}
    canaries.by_place |= {"~/.aws/credentials: secret": hidden["AWS_SECRET_ACCESS_KEY"]}
    lines = [f"aws_access_key_id = {hidden['AWS_ACCESS_KEY_ID']}"]
    lines += [f"aws_secret_access_key = {hidden['AWS_SECRET_ACCESS_KEY']}"]
    (home / ".aws" / "credentials").write_text("[default]\n" + "\n".join(lines) + "\n")
    names = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD")
    names += ("RAY_AUTH_TOKEN", "MY_JUDGE", "OPENAI_API_KEY", "GOOGLE_API_KEY", "DB_PASSWORD", "AZURE_CLIENT_SECRET")
    environment = {name: canaries.new(name) for name in names}
    environment["MLFLOW_TRACKING_URI"] = f"http://me:{canaries.new('MLFLOW_TRACKING_URI')}@127.0.0.1:9"
    environment["MLFLOW_TRACKING_USERNAME"] = "me"
    environment["HTTPS_PROXY"] = f"http://me:{canaries.new('HTTPS_PROXY')}@127.0.0.1:9"
    environment["PIP_INDEX_URL"] = f"https://me:{canaries.new('PIP_INDEX_URL')}@127.0.0.1:9/simple"
    environment["AZURE_STORAGE_CONNECTION_STRING"] = (
        f"AccountName=a;AccountKey={canaries.new('AZURE_STORAGE_CONNECTION_STRING')};EndpointSuffix=x"
    )
    environment["BLOB"] = f"/blob?X-Amz-Date=1&X-Amz-Signature={canaries.new('a signed URL')}&x=1"
    plain = {name: os.environ[name] for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "PYTHONPATH") if name in os.environ}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **plain,
        **environment,
        "PATH": path,
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(home),
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": "127.0.0.1",
    }


def test_no_canary_comes_out(s3_server: S3Server, tiny_model: Path, tmp_path: Path, short_folder: Path) -> None:
    canaries, home = Canaries(), tmp_path / "home"
    hidden = s3_server.identity("canary", s3_server.bucket, "Read", "List", "Write", "Tagging")
    environment = plant(canaries, home, hidden)
    work = tmp_path / "work"
    work.mkdir()
    (work / "losses_that_leak.py").write_text(LOSS)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 60)
    uri = s3_server.uri("canaries")
    train = {"max_steps": 4, "eval_every_steps": 4, "checkpoint_every_steps": 4}
    # Its answers shall be others than the reference's, for there is nothing to judge else.
    changed = {"train": train, "optimizer": {"learning_rate": 0.1, "warmup_steps": 0}}
    tracking = {"trackers": ["tensorboard", "wandb", "mlflow"]}
    config = to_yaml(tiny_config(uri, "good", tiny_model, pairs, tracking=tracking, **changed))
    (work / "c.yaml").write_text(config)
    client = {**environment, "AWS_PROFILE": "default"}
    outputs = dict[str, bytes]()

    def dpo_ray(name: str, *arguments: str, **more: str) -> int:
        """Runs a command, and keeps what it says."""
        done = subprocess.run(
            ["dpo-ray", *arguments], env={**client, **more}, cwd=work, capture_output=True, timeout=240, check=False
        )
        outputs[name] = done.stdout + done.stderr
        print(f"{name}: {done.returncode}", outputs[name].decode(), sep="\n")
        return done.returncode

    with JudgeServer(tmp_path) as judge, Cluster(environment, short_folder, environment["RAY_AUTH_TOKEN"]) as cluster:
        address = ("--address", cluster.dashboard)
        assert dpo_ray("submit", "submit", "c.yaml", *address) == 0
        leak = ("objective.loss=losses_that_leak:LEAKS", "name=bad", "recovery.max_worker_failures=0")
        assert dpo_ray("submit, fails", "submit", "c.yaml", *address, *(f"--set={each}" for each in leak)) == 1
        judging = (
            f"endpoint={judge.url}/v1",
            "endpoint_model=m",
            "key_variable=MY_JUDGE",
            "prompts=4",
            "judge=endpoint",
        )
        evaluating = [f"--set=evaluation.{each}" for each in (*judging, "max_new_tokens=8")]
        assert dpo_ray("evaluate", "evaluate", f"{uri}/good", *evaluating, RAY_ADDRESS=cluster.address) == 0
        assert judge.seen()[0]["key"] == f"Bearer {canaries.by_place['MY_JUDGE']}"
        password = canaries.new("AWS_ENDPOINT_URL")
        elsewhere = {"AWS_ENDPOINT_URL": f"http://me:{password}@127.0.0.1:9", "DPO_RAY_STORAGE_PATIENCE_S": "1"}
        assert dpo_ray("train, no storage", "train", "c.yaml", **elsewhere) == 2
    outputs |= cluster.seen
    for path in TOLD:
        assert outputs[path], path
    for folder in (short_folder, home / "wandb"):
        outputs |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for run in ("good", "bad"):
        for path in storage.filesystem(f"{uri}/{run}")[0].find(f"{uri}/{run}"):
            outputs[path] = storage.read_bytes(f"s3://{path}")
    for name in ("config.yaml", "report.html", "outcome.json", "evaluation/summary.json", "export/README.md"):
        assert any(place.endswith(f"good/{name}") for place in outputs), name
    for part in ("job-driver", "worker-", "raylet", "ray-train", "run-", "events.out.tfevents"):
        assert any(part in place for place in outputs), part
    # What was to be shown is: without the secrets in it.
    assert b"ValueError: no model for ***" in outputs["submit, fails"]
    assert b"OSError: /blob?X-Amz-Date=1&X-Amz-Signature=***&x=1: no answer" in outputs["submit, fails"]
    assert b"mlflow is down, training goes on: API request to http://127.0.0.1:9/" in outputs["submit"]
    assert b"http://127.0.0.1:9 does not answer" in outputs["train, no storage"]
    found = canaries.found_in(outputs)
    assert not found, "\n".join(map(str, sorted(found)))
