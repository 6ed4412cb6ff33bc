"""`dpo-ray doctor` on this machine and on a cluster of several raylets, and what `train` refuses before it waits."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from conftest import S3Server
from helpers import tiny_config, write_pairs
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

from dpo_ray import storage
from dpo_ray.config import Config, to_yaml
from dpo_ray.errors import ConfigError, StorageError
from dpo_ray.orchestration import preflight
from dpo_ray.orchestration.nodes import gloo_address
from dpo_ray.orchestration.preflight import Row, examine
from dpo_ray.orchestration.resources import ensure_resources

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from dpo_ray.cli import main; main()", *arguments]
    return subprocess.run(
        command,
        env={**os.environ, "COLUMNS": "250", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three raylets: a head and two nodes, of which one has what a reference may ask for."""
    if ray.is_initialized():
        ray.shutdown()
    made = Cluster()
    with contextlib.chdir(tmp_path_factory.mktemp("nodes")):
        made.add_node(num_cpus=1, include_dashboard=False)
        made.add_node(num_cpus=2)
        made.add_node(num_cpus=2, resources={"reference": 1})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def on_s3(s3_server: S3Server, tiny_model: Path, tmp_path: Path) -> Config:
    """A run of which everything lies on object storage."""
    for path in tiny_model.iterdir():
        storage.upload(str(path), s3_server.uri(f"doctor/{tmp_path.name}/model/{path.name}"))
    pairs = write_pairs(tmp_path / "pairs.jsonl", 20)
    storage.upload(pairs, s3_server.uri(f"doctor/{tmp_path.name}/pairs.jsonl"))
    place = s3_server.uri(f"doctor/{tmp_path.name}")
    config = tiny_config(f"{place}/runs", "run", tiny_model, f"{place}/pairs.jsonl")
    return config.model_copy(update={"model": config.model.model_copy(update={"path": f"{place}/model"})})


def wrong(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.level == "wrong"]


def test_all_is_well_on_a_cluster_with_object_storage(cluster: Cluster, on_s3: Config) -> None:
    rows = examine(on_s3, lambda: None)
    assert wrong(rows) == []
    found = {(row.check, row.level): row for row in rows}
    assert "3 nodes" in found["Ray", "ok"].result
    assert found["conditional writes", "ok"].result == "supported"
    room = {row.where: row.result for row in rows if row.check == "room"}
    each = "1 x {CPU: 1}: 5 fit now"
    assert room == {"scaling.workers, reference.replicas, data.label_selector": each}
    assert "20 tensors in 1 files" in found["model", "ok"].result
    # Each node by its name: what they say of themselves is the same and stands in one row.
    nodes = found["versions", "ok"].where
    assert all(node["NodeID"][:6] in nodes for node in ray.nodes())
    everywhere = [row for row in rows if row.check == "storage" and "all nodes" in row.result]
    assert [row.where for row in everywhere] == [nodes]
    assert found["clock", "ok"].where == nodes
    with pytest.raises(StorageError, match="no such file"):
        storage.expand(on_s3.storage_path)  # Nothing is left of the markers.


def test_a_path_that_the_nodes_do_not_share(cluster: Cluster, tiny_model: Path, tmp_path: Path) -> None:
    """Raylets of one machine share all paths; one relative to the process stands for those that nodes do not share."""
    config = tiny_config(str(tmp_path / "runs"), "run", tiny_model, write_pairs(tmp_path / "pairs.jsonl", 20))
    assert wrong(examine(config, lambda: None)) == []
    apart = config.model_copy(update={"storage_path": "/proc/self/cwd/only-here"})
    (tmp_path / "driver").mkdir()
    with contextlib.chdir(tmp_path / "driver"):
        rows = wrong(examine(apart, lambda: None))
    assert {row.check for row in rows} == {"storage"}
    assert any("cannot read what was written on this machine" in row.result for row in rows)


def test_what_the_cluster_can_never_start(cluster: Cluster, on_s3: Config) -> None:
    def config(scaling: dict[str, object], **reference: object) -> Config:
        changed = {"scaling": on_s3.scaling.model_copy(update=scaling)}
        return on_s3.model_copy(update={**changed, "reference": on_s3.reference.model_copy(update=reference)})

    ensure_resources(config({"workers": 3}))
    nodes = r"it has 1 x {CPU: 1}, 1 x {CPU: 2, reference: 1}, 1 x {CPU: 2}"
    with pytest.raises(
        ConfigError, match=rf"scaling.workers: 8 x {{CPU: 1}}: the cluster has room for 5 .*\({nodes}\)"
    ):
        ensure_resources(config({"workers": 8}))
    with pytest.raises(ConfigError, match=r"scaling.workers: 1 x {CPU: 1, GPU: 1}: the cluster has room for 0"):
        ensure_resources(config({"gpus_per_worker": 1}))
    # Enough in all, but on no single node.
    with pytest.raises(ConfigError, match=r"1 x {CPU: 3}: the cluster has room for 0"):
        ensure_resources(config({"cpus_per_worker": 3.0}))
    with pytest.raises(ConfigError, match="together they need 6 CPU, the cluster can have at most 5"):
        ensure_resources(config({"workers": 4}, replicas=2))
    with pytest.raises(ConfigError, match=r"reference.replicas: 2 x {CPU: 1, reference: 1}: .* room for 1"):
        ensure_resources(config({}, replicas=2, resources_per_replica={"reference": 1.0}))
    # Scores that are there already ask for nothing.
    ensure_resources(config({}, replicas=2, resources_per_replica={"reference": 1.0}), references=False)


def test_a_cluster_that_grows(cluster: Cluster, on_s3: Config) -> None:
    """What an autoscaler writes for the cluster to read, written by hand."""
    from ray.core.generated import autoscaler_pb2

    place = {"namespace": ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE}
    key = ray._raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY
    many = on_s3.model_copy(update={"scaling": on_s3.scaling.model_copy(update={"workers": 8, "gpus_per_worker": 1})})
    known = autoscaler_pb2.ClusterConfig()
    known.node_group_configs.add(name="gpu", resources={"CPU": 4, "GPU": 4}, max_count=2)
    try:
        _internal_kv_put(key, known.SerializeToString(), **place)
        ensure_resources(many)
        known.node_group_configs[0].max_count = 1
        _internal_kv_put(key, known.SerializeToString(), **place)
        with pytest.raises(ConfigError, match="room for 4 of them"):
            ensure_resources(many)
    finally:
        _internal_kv_del(key, **place)
    with pytest.raises(ConfigError, match="room for 0 of them"):
        ensure_resources(many)
    # An autoscaler that keeps its limits to itself is not contradicted. The cluster's own monitor soon writes again.
    _internal_kv_put(
        "__autoscaling_status", json.dumps({"autoscaler_report": {"active_nodes": {"ray.head.default": 1}}})
    )
    ensure_resources(many)


@pytest.mark.parametrize(
    ("host", "mode", "found"),
    [
        ("127.0.0.1", "disabled", "note off; the dashboard listens on loopback only | note off: who reaches this node"),
        ("0.0.0.0", "disabled", "wrong off, and the dashboard listens on"),
        ("0.0.0.0", "token", "ok token authentication is on"),
    ],
)
def test_a_cluster_that_anyone_may_use(host: str, mode: str, found: str) -> None:
    code = f"""
import os, ray
ray.init(address="local", num_cpus=1, include_dashboard=True, dashboard_host="{host}", log_to_driver=False)
os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
from dpo_ray.orchestration import preflight
from dpo_ray.orchestration.nodes import gloo_address
os.environ["RAY_AUTH_MODE"] = "token"  # A client may send what nobody asks for.
asks = ray.get(ray.remote(preflight._asks_for_token).remote())
rows = [preflight._authentication_row("node", asks, address) for address in ("127.0.0.1", "10.0.0.1")]
print("found", " | ".join(f"{{row.level}} {{row.result}}" for row in rows))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "0" * 32},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert f"found {found}" in done.stdout


def test_an_address_that_others_cannot_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preflight._network_row("a", "127.0.1.1", 1).level == "ok"
    assert preflight._network_row("a", "10.0.0.1", 2).level == "ok"
    for gloo in ("127.0.1.1", ""):
        row = preflight._network_row("a", gloo, 2)
        assert row.level == "wrong"
        assert "GLOO_SOCKET_IFNAME" in row.mend
    # What gloo itself is led by, where the environment names it.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert gloo_address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    assert gloo_address() == ""


def test_a_model_that_is_not_whole(tiny_model: Path, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    whole = (tiny_model / "model.safetensors").read_bytes()
    weights.write_bytes(whole)
    names = preflight._tensors(str(weights))
    assert len(names) == 20
    weights.write_bytes(whole[:-7])
    assert preflight._tensors(str(weights)) == f"{len(whole) - 7} bytes instead of {len(whole)}"
    weights.write_bytes(whole[:500])
    assert "cut off" in preflight._tensors(str(weights))
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "cut off" in preflight._tensors(str(weights)) or "not a safetensors" in preflight._tensors(str(weights))

    shutil.copy(tiny_model / "config.json", tmp_path)
    weights.write_bytes(whole)
    index = {"weight_map": dict.fromkeys(names, "model.safetensors") | {"lm_head.weight": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (row,) = preflight._check_weights("model", str(tmp_path))
    assert row.level == "wrong"
    assert row.result == "model-2.safetensors: lacks what model.safetensors.index.json promises"


def test_clocks() -> None:
    assert preflight._clock_row("a", 100.0, 100.5, 101.0).level == "ok"
    ahead = preflight._clock_row("a", 100.0, 104.5, 101.0)
    assert (ahead.level, ahead.result) == ("wrong", "differs by 3.5 s or more")
    assert preflight._clock_row("a", 100.0, 97.0, 101.0).level == "wrong"
    # A slow answer proves nothing.
    assert preflight._clock_row("a", 100.0, 103.0, 105.0).level == "note"


def test_the_command_on_this_machine(s3_server: S3Server, tiny_model: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 20)
    (tmp_path / "c.yaml").write_text(to_yaml(tiny_config(str(tmp_path / "runs"), "run", tiny_model, pairs)))
    done = run("doctor", str(tmp_path / "c.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is well" in done.stdout
    assert "✗" not in done.stdout
    assert list((tmp_path / "runs").iterdir()) == []

    # Everything that is wrong at once: each its red row, and no traceback.
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes()[:5000])
    done = run(
        *("doctor", str(tmp_path / "c.yaml"), "--set", f"model.path={broken}"),
        *("--set", f"storage_path={s3_server.uri('doctor')}", "--set", "data.train=[nowhere/*.jsonl]"),
        *("--set", "scaling.workers=2", "--set", "scaling.gpus_per_worker=1", "--set", "reference.gpus_per_replica=0"),
        **s3_server.identity("reader", s3_server.bucket, "Read", "List"),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    marked = {line.split()[1] for line in done.stdout.splitlines() if "✗ wrong" in line}
    assert marked == {"storage", "pairs", "model", "room", "resources"}
    for said in ("access denied", "no such file", "model.safetensors: 5000 bytes instead of", "{CPU: 1, GPU: 1}"):
        assert said in done.stdout

    assert run("doctor", str(tmp_path / "none.yaml")).returncode == 2


def test_train_says_at_once_what_could_never_start(tiny_model: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 20)
    (tmp_path / "c.yaml").write_text(to_yaml(tiny_config(str(tmp_path / "runs"), "run", tiny_model, pairs)))
    done = run(
        "train", str(tmp_path / "c.yaml"), "--set", "scaling.gpus_per_worker=1", "--set", "reference.gpus_per_replica=0"
    )
    assert done.returncode == 2, done.stderr
    assert "scaling.workers: 1 x {CPU: 1, GPU: 1}: the cluster has room for 0 of them at most" in done.stderr
    done = run("reference", str(tmp_path / "c.yaml"), "--set", "reference.resources_per_replica={tpu: 2}")
    assert done.returncode == 2, done.stderr
    assert "reference.replicas: 1 x {CPU: 1, tpu: 2}: the cluster has room for 0" in done.stderr
    began = time.monotonic()
    done = run("train", str(tmp_path / "c.yaml"), RAY_ADDRESS="127.0.0.1:9")
    assert done.returncode == 2, done.stderr
    assert "RAY_ADDRESS: no Ray cluster answers at 127.0.0.1:9" in done.stderr
    assert time.monotonic() - began < 60
    assert "Traceback" not in done.stderr + done.stdout


def test_a_cluster_that_wants_a_token(tiny_model: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 20)
    (tmp_path / "c.yaml").write_text(to_yaml(tiny_config(str(tmp_path / "runs"), "run", tiny_model, pairs)))
    code = """
import ray, sys
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
print("at", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as head:
        assert head.stdout is not None
        address = next(line.split()[1] for line in head.stdout if line.startswith("at "))
        done = run("train", str(tmp_path / "c.yaml"), RAY_ADDRESS=address, RAY_AUTH_MODE="disabled")
        head.communicate("\n")
    assert done.returncode == 2, done.stderr
    assert f"RAY_ADDRESS: the Ray cluster at {address} answers, but does not let this process in" in done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
