"""Ray's autoscaler starts the nodes that a run needs, from none, and takes them away when they are not needed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.autoscaling import AutoscaledCluster
from faults.harness import Place

pytestmark = [pytest.mark.faults, pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

NODE_TYPES = {
    "data": {"resources": {"CPU": 1}, "labels": {"pool": "data"}, "max_workers": 1},
    "policy": {"resources": {"CPU": 1}, "labels": {"pool": "policy"}, "max_workers": 2},
    "reference": {"resources": {"CPU": 1, "reference": 1}, "labels": {"pool": "reference"}, "max_workers": 1},
}


@pytest.fixture
def alone(tmp_path: Path, tiny_model: Path) -> Place:
    """Runs of their own, with nothing prepared or scored."""
    return Place(str(tmp_path / "storage"), tmp_path, tiny_model)


@pytest.fixture
def cluster(alone: Place) -> Iterator[AutoscaledCluster]:
    missing = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip("namespaces of their own need root, unshare, nsenter and ip: Ray's fake nodes outlive their head")
    alone.plant("cluster", [], 0.0)
    made = AutoscaledCluster(alone, NODE_TYPES)
    yield made
    made.close()
    print(*made.said, sep="\n")


def test_from_none_to_none(alone: Place, cluster: AutoscaledCluster, drivers: Any) -> None:
    cluster.wait_for("head", "comes")
    config = alone.config(
        "grown",
        data={"label_selector": {"pool": "data"}},
        # More than there can be: what there can be is asked for all the same.
        scaling={"workers": {"min": 1, "max": 3}, "label_selector": {"pool": "policy"}, "grow_after_s": 1},
        reference={"label_selector": {"pool": "reference"}},
    )
    driver = alone.start(config, prefix=cluster.prefix, pace_s=1.0, **cluster.environment)
    drivers.append(driver)
    driver.finish(110)
    for name, often in (("policy", 2), ("reference", 1), ("data", 1)):
        cluster.wait_for(name, "goes", often)
    events = sorted([*driver.said, *cluster.said], key=lambda said: said["time"])
    print()
    for said in events:
        what = said.get("text") or (f"step {said.get('step')}" if "node" not in said else f"a {said['node']} node")
        print(f"{said['time'] - events[0]['time']:7.1f} s  {what}: {said['event']}")
    alone.assert_exact("grown")
