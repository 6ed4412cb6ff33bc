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


def test_from_none_to_none(alone: Place, cluster: AutoscaledCluster, drivers: Any) -> None:
    cluster.wait_for("head", "comes")
    config = alone.config(
        "grown",
        data={"label_selector": {"pool": "data"}},
        # More than there can be: what there can be is asked for all the same.
        scaling={"workers": {"min": 1, "max": 3}, "label_selector": {"pool": "policy"}, "grow_after_s": 1},
        reference={"label_selector": {"pool": "reference"}},
    )

    # Before the run: what it will wait for, and that three workers at least would be too many.
    said = " ".join(cluster.command("doctor", str(config)).stdout.split())
    assert "1 x {CPU: 1, label pool=policy}: 0 fit now; the autoscaler could add 2 on policy" in said
    assert "1 x {CPU: 1, label pool=reference}: 0 fit now; the autoscaler could add 1 on reference" in said
    assert "1 x {CPU: 1, label pool=data}: 0 fit now; the autoscaler could add 1 on data" in said
    refused = cluster.command("train", str(config), "--set", "scaling.workers=3")
    assert refused.returncode == 2
    assert "scaling.workers: 3 x {CPU: 1, label pool=policy}: the cluster has room for 2" in refused.stderr
    assert cluster.there() == []

    driver = alone.start(config, prefix=cluster.prefix, pace_s=0.7, **cluster.environment)
    drivers.append(driver)
    driver.finish()
    for name, often in (("policy", 2), ("reference", 1), ("data", 1)):
        cluster.wait_for(name, "goes", often)
    told = [{**each, "node": ""} for each in driver.said]
    events = sorted([*told, *cluster.said], key=lambda each: each["time"])
    for each in events:
        what = f"a {each['node']} node" if each["node"] else each.get("text", each.get("step", ""))
        print(f"{each['time'] - driver.said[0]['time']:7.1f} s  {each['event']:8}{what}")

    alone.assert_exact("grown")
    assert cluster.there() == []
    order = [(each["node"], each["event"]) for each in events]
    steps = [index for index, each in enumerate(order) if each == ("", "step")]
    # Nodes for the pairs come first. Nobody's node has left before its part is done.
    assert order.index(("data", "comes")) < order.index(("policy", "comes")) < steps[0]
    assert order.index(("reference", "comes")) < steps[0]
    assert steps[0] < order.index(("reference", "goes")) < steps[-1]
    assert order.index(("", "done")) < order.index(("policy", "goes"))
    assert [order.count((name, "comes")) for name in NODE_TYPES] == [1, 2, 1]
    sizes = [attempt["world_size"] for attempt in alone.attempts("grown")]
    assert sizes[-1] == 2
    assert sizes == sorted(sizes)
