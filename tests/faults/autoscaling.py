"""A cluster whose nodes Ray's autoscaler starts and ends: raylets of this machine, in namespaces of their own.

As a script it is what runs in there: the head, and who tells which nodes come and go.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import ray

from faults.harness import Place, until

ADDRESS = "127.0.0.1:6379"
# Of Ray's fake provider, and its head's only.
HEAD_ID = "f" * 51 + "00000"
PROVIDER = {
    "type": "external",
    "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
    "use_node_id_as_ip": True,
    "disable_node_updaters": True,
    "disable_launch_config_check": True,
    "launch_multiple": True,
    "head_node_id": HEAD_ID,
    "gcs_address": ADDRESS,
}
ENVIRONMENT = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
}
# For who connects too: a token of the machine is not looked for.
FOR_ALL = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
ISOLATE = ("unshare", "-n", "-m", "-u", "-p", "--fork", "--kill-child", "--mount-proc")


def cluster_file(node_types: Mapping[str, Mapping[str, Any]], max_workers: int) -> dict[str, Any]:
    """What the autoscaler is told; workers' nodes go after six idle seconds."""
    lists = ("file_mounts_sync_continuously", "cluster_synced_files", "rsync_exclude", "rsync_filter")
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "test",
        "max_workers": max_workers,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 0.1,
        "provider": PROVIDER,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{name: {"node_config": {}, "min_workers": 0, **about} for name, about in node_types.items()},
        },
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **dict.fromkeys(lists, []),
        **{f"{name}_commands": [] for name in commands},
        "file_mounts_sync_continuously": False,
    }


class AutoscaledCluster:
    """The cluster; `said` has each node's coming and going, with its type and the time."""

    def __init__(self, place: Place, node_types: Mapping[str, Mapping[str, Any]], max_workers: int = 8) -> None:
        own = place.folder / "autoscaled"
        (own / "ray").mkdir(parents=True, exist_ok=True)
        config = own / "cluster.json"
        config.write_text(json.dumps(cluster_file(node_types, max_workers)))
        self.environment = {**FOR_ALL, "HOME": str(own), "RAY_ADDRESS": ADDRESS}
        inside = (
            f"ip link set lo up && hostname test && mkdir -p /tmp/ray && mount --bind {own}/ray /tmp/ray && "
            f"mount -t tmpfs -o size=1g shm /dev/shm && exec {sys.executable} {__file__} {config}"
        )
        environment = {**os.environ, **place.planted_environment("cluster"), **FOR_ALL, "HOME": str(own)}
        environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(Path(__file__).parents[1])])
        self.said: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [*ISOLATE, "bash", "-c", inside], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"node"'):
                self.said.append(json.loads(line))

    @property
    def prefix(self) -> tuple[str, ...]:
        """What makes a command run in there."""
        (first,) = psutil.Process(self.process.pid).children()
        return ("nsenter", "-t", str(first.pid), "-n", "-m", "-u", "-p")

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the command line in there."""
        code = "from dpo_ray.cli import main; main()"
        return subprocess.run(
            [*self.prefix, sys.executable, "-c", code, *arguments],
            env={**os.environ, **self.environment, "COLUMNS": "400"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def wait_for(self, node: str, event: str, count: int = 1) -> dict[str, Any]:
        """The `count`th time that a node of a type has come or gone."""

        def look() -> dict[str, Any] | None:
            assert self.process.poll() is None, "the cluster is gone"
            found = [said for said in self.said if (said["node"], said["event"]) == (node, event)]
            return found[count - 1] if len(found) >= count else None

        return dict(until(look))

    def there(self) -> list[str]:
        """Types of the workers' nodes that are there."""
        come = [said["node"] for said in self.said if said["event"] == "comes" and said["node"] != "head"]
        for said in self.said:
            if said["event"] == "goes":
                come.remove(said["node"])
        return come

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()


def _head(config: str) -> None:
    start = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--port=6379", "--num-cpus=0"]
    start += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--object-store-memory=100000000"]
    head = subprocess.Popen(
        [*start, f"--autoscaling-config={config}", "--disable-usage-stats"],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    known: dict[str, str] = {}
    client: Any = None
    while head.poll() is None:
        time.sleep(0.2)
        try:
            client = client or ray._raylet.GcsClient(address=ADDRESS)
            nodes = client.get_all_node_info(timeout=2)
        except Exception:
            continue  # Not up yet.
        for node in nodes.values():
            name, alive = node.node_id.hex(), node.state == 0
            kind = node.node_type_name or "head"
            event = "comes" if alive else "goes"
            if known.get(name) != event and (alive or name in known):
                known[name] = event
                print(json.dumps({"node": kind, "event": event, "time": time.time(), "id": name}), flush=True)


if __name__ == "__main__":
    _head(sys.argv[1])
