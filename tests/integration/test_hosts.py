"""A job on hosts of their own, which share nothing but the network: with the token all doors open, without it none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import S3Server, serve_s3
from doors import knock
from helpers import tiny_config, write_pairs
from hosts import DASHBOARD_PORT, GCS_PORT, Host, Network, RayHosts, needs_hosts

from dpo_ray import storage
from dpo_ray.config import to_yaml
from dpo_ray.orchestration.verify import verify

CANARY = "canary-4d1e9b"
pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def network() -> Iterator[Network]:
    needs_hosts()
    with Network("head", "worker-1", "worker-2", "laptop", "stranger", "store") as made:
        yield made


@pytest.fixture
def cluster(network: Network) -> RayHosts:
    """Off; it asks for a token, which the laptop has."""
    made = RayHosts(network["head"], [network["worker-1"], network["worker-2"]], num_cpus=3)
    made.ask_for_a_token(network["laptop"])
    return made


def answers(hosts: list[Host], token: str | None) -> dict[tuple[str, int], str]:
    """How each port of the hosts that can be reached answers, but for those that are gone meanwhile."""
    places = [(host, port) for host in hosts for port in host.ports()]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda place: knock(place[0].address, place[1], token), places)
        said = {(host.name, port): answer for (host, port), answer in zip(places, found, strict=True)}
    return {place: answer for place, answer in said.items() if answer != "gone"}


def run_file(folder: Path, store: S3Server, model: Path) -> Path:
    """A configuration of which everything lies on the S3 server; one worker, and the reference, fit on a host."""
    for path in model.iterdir():
        storage.upload(str(path), store.uri(f"model/{path.name}"))
    storage.upload(write_pairs(folder / "pairs.jsonl", 60), store.uri("pairs.jsonl"))
    train = {"max_steps": 4, "checkpoint_every_steps": 4, "eval_every_steps": None}
    places = (store.uri("runs"), "job", store.uri("model"), store.uri("pairs.jsonl"))
    file = folder / "work" / "run.yaml"
    file.parent.mkdir()
    file.write_text(to_yaml(tiny_config(*places, scaling={"workers": 2, "cpus_per_worker": 2}, train=train)))
    return file


def test_a_job_from_another_host(network: Network, cluster: RayHosts, tiny_model: Path, tmp_path: Path) -> None:
    laptop, stranger, hosts = network["laptop"], network["stranger"], [cluster.head, *cluster.workers]
    with serve_s3(network["store"].address, network["store"].prefix) as store:
        file = run_file(tmp_path, store, tiny_model)
        for host in hosts:
            host.own_environment |= {"HF_TOKEN": CANARY, "WANDB_API_KEY": CANARY}
        cluster.start()
        submit = ("ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", str(file.parent))
        with laptop.process(*submit, "--", "dpo-ray", "train", "run.yaml") as job:
            assert job.stdout is not None
            output = ""
            for line in job.stdout:
                output += line
                if "pairs to train on" in line:
                    # Workers of Ray's are there too, and listen.
                    closed, wrong, opened = (answers(hosts, each) for each in (None, "0" * 64, cluster.token))
        assert job.returncode == 0, output
        assert "4 steps done" in output

        for said in (closed, wrong):
            assert set(said.values()) == {"refuses", "metrics"}, said
            # Numbers that Prometheus fetches; nobody needs a token for them.
            assert sum(answer == "metrics" for answer in said.values()) == 5, said
        assert set(opened.values()) == {"lets in", "metrics"}, opened
        assert {("head", port) for port in (DASHBOARD_PORT, GCS_PORT, 10001)} <= opened.keys()

        done = stranger.run("dpo-ray", "submit", str(file), "--address", cluster.dashboard)
        assert done.returncode == 2, done.stderr
        assert "the cluster does not let us in: " in done.stderr
        status = ("ray", "status", "--address", f"{cluster.head.address}:{GCS_PORT}")
        assert stranger.run(*status).returncode == 1
        assert "6.0 CPU" in laptop.run(*status).stdout

        run = store.uri("runs/job")
        verdict = verify(run)
        assert verdict.exact, verdict.findings
        assert "model.safetensors" in storage.list_names(storage.join(run, "export"))
        # Each host had its rank.
        (attempt,) = storage.read_json_lines(storage.join(run, "attempts.jsonl"))
        assert attempt["world_size"] == 2

        # What the nodes know stands neither in the run, nor in what Ray tells of it or writes down.
        written = {place: storage.read_bytes(f"s3://{place}") for place in storage.filesystem(run)[0].find(run)}
        assert len(written) > 15
        logs = [path for host in hosts for path in (host.home / "ray").rglob("*") if path.is_file()]
        assert any("job-driver" in path.name for path in logs)
        written |= {str(path): path.read_bytes() for path in (*logs, *(host.log for host in hosts))}
        written |= {path: cluster.tells(path) for path in ("/api/jobs/", "/api/v0/nodes", "/api/v0/actors?detail=1")}
        written["output"] = output.encode()
        for secret in (CANARY, cluster.token, os.environ["AWS_SECRET_ACCESS_KEY"]):
            assert [place for place, content in written.items() if secret.encode() in content] == []
