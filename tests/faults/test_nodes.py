"""Nodes die, are drained, and come: the run shrinks and grows at the exact next global batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from dpo_ray.training import manifest
from faults.harness import Driver, Place, until

pytestmark = [pytest.mark.faults, pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]


class Machines:
    """A head without room for work, and nodes with room for one policy worker each: a raylet for each of them."""

    def __init__(self, place: Place, num_nodes: int) -> None:
        # Raylets hand their environment to the workers that they start.
        self._environment = place.planted_environment("cluster")
        with pytest.MonkeyPatch.context() as environment:
            for name, value in self._environment.items():
                environment.setenv(name, value)
            self.cluster = Cluster()
            self.cluster.add_node(num_cpus=0, include_dashboard=False)
        self.nodes = [self.add() for _ in range(num_nodes)]

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, num_cpus: int = 1, **resources: float) -> Any:
        with pytest.MonkeyPatch.context() as environment:
            for name, value in self._environment.items():
                environment.setenv(name, value)
            return self.cluster.add_node(num_cpus=num_cpus, resources=resources)

    def with_worker(self, kind: str = "RayTrainWorker") -> Any:
        """A node that has a policy worker, or another actor."""
        for node in self.nodes:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            if any(kind in " ".join(child.cmdline()) for child in raylet.children(recursive=True)):
                return node
        raise AssertionError(f"no node has a {kind}")

    def power_off(self, node: Any) -> None:
        """No process of the node sees it coming."""
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, notice_s: float) -> None:
        """What a cloud's notice of a spot node's end leads to."""
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + notice_s) * 1000)
        accepted, why = GcsClient(address=self.address).drain_node(node.node_id, reason, "notice", deadline_ms)
        assert accepted, why


@pytest.fixture
def machines(place: Place, twin: str) -> Iterator[Any]:
    """Makes clusters; the twin has filled the reference store, so that no reference actor needs room."""
    made: list[Machines] = []

    def make(num_nodes: int) -> Machines:
        made.append(Machines(place, num_nodes))
        return made[-1]

    yield make
    for each in made:
        each.cluster.shutdown()


def steps_said(driver: Driver) -> list[int]:
    return [said["step"] for said in driver.said if said["event"] == "step"]


def test_shrink_to_the_survivors(place: Place, twin: str, drivers: Any, machines: Any) -> None:
    """Fault 6: a node's power fails; the run goes on with what is left."""
    cluster = machines(2)
    # A node has one worker: two copies of the weights, then one.
    config = place.config("shrink", scaling={"workers": {"min": 1, "max": 2}, "shard_over": "node"})
    driver = place.start(config, RAY_ADDRESS=cluster.address)
    drivers.append(driver)
    driver.wait_for_step(10)
    cluster.power_off(cluster.with_worker())
    died, seen = time.time(), max(steps_said(driver))
    after = driver.wait_for(lambda said: said["event"] == "step" and said["time"] > died + 3 and said["step"] > seen)
    driver.finish()
    place.assert_same_but_for_rounding("shrink", twin)
    assert {line["shard_over"] for line in place.lines("shrink", "ledger.jsonl")} == {1}
    attempts = place.attempts("shrink")
    assert [attempt["world_size"] for attempt in attempts] == [2, 1]
    assert attempts[1]["reason"] == "1 node with workers died"
    print(f"from the power cut to the next step: {after['time'] - died:.1f} s")


def test_grow_and_shrink(place: Place, twin: str, drivers: Any, machines: Any) -> None:
    """Fault 10: 2 -> 3 -> 1 in the middle of an epoch. No step that was finished before growing is done twice."""
    cluster = machines(2)
    scaling = {"workers": {"min": 1, "max": 3}, "grow_after_s": 1}
    config = place.config("resize", scaling=scaling, train={"checkpoint_every_steps": 100})
    driver = place.start(config, RAY_ADDRESS=cluster.address, pace_s=1.0)
    drivers.append(driver)
    driver.wait_for_step(2)
    cluster.nodes.append(cluster.add())
    driver.wait_for(lambda said: said["event"] == "phase" and "room for 3 workers instead of 2" in said["text"])
    until(lambda: len(place.attempts("resize")) == 2, driver)
    grown = driver.wait_for_step(place.attempts("resize")[1]["position"] + 2)
    assert steps_said(driver) == list(range(1, grown["step"] + 1))
    cluster.power_off(cluster.nodes[0])
    cluster.power_off(cluster.nodes[2])
    driver.finish()
    place.assert_same_but_for_rounding("resize", twin)
    attempts = place.attempts("resize")
    assert [attempt["world_size"] for attempt in attempts] == [2, 3, 1]
    assert attempts[1]["position"] == attempts[2]["position"] > 0


def test_drain(place: Place, twin: str, drivers: Any, machines: Any) -> None:
    """Fault 8: eight seconds' notice are enough for a checkpoint: at most one step is done again."""
    cluster = machines(2)
    config = place.config("drain", scaling={"workers": {"min": 1, "max": 2}}, train={"checkpoint_every_steps": 100})
    driver = place.start(config, RAY_ADDRESS=cluster.address)
    drivers.append(driver)
    driver.wait_for_step(6)
    node = cluster.with_worker()
    cluster.drain(node, notice_s=8)
    time.sleep(8)
    cluster.power_off(node)
    driver.finish()
    place.assert_same_but_for_rounding("drain", twin)
    said = steps_said(driver)
    assert len(said) - len(set(said)) <= 1
    assert [attempt["world_size"] for attempt in place.attempts("drain")] == [2, 1]
    assert place.attempts("drain")[1]["position"] >= 6


def test_drain_too_short(place: Place, twin: str, drivers: Any, machines: Any) -> None:
    """Fault 9: the node is gone before its part is written: the checkpoint before is used, never a part."""
    cluster = machines(2)
    config = place.config("short", scaling={"workers": {"min": 1, "max": 2}}, train={"checkpoint_every_steps": 5})
    slow = [{"point": "shard", "rank": rank, "step": step, "do": "slow"} for rank in (0, 1) for step in range(6, 24)]
    driver = place.start(config, *slow, RAY_ADDRESS=cluster.address, pace_s=0.5)
    drivers.append(driver)
    driver.wait_for_step(6)
    node = cluster.with_worker()
    cluster.drain(node, notice_s=2)
    time.sleep(3)
    cluster.power_off(node)
    driver.finish()
    place.assert_same_but_for_rounding("short", twin)
    assert [attempt["position"] for attempt in place.attempts("short")] == [0, 5]


def test_the_node_of_the_reference_dies(place: Place, twin: str, drivers: Any, machines: Any) -> None:
    """With the replica on it, in the middle of a chunk; another node of its kind takes its place."""
    place.forget_scores()
    cluster = machines(0)
    cluster.nodes += [cluster.add(2), cluster.add(2), cluster.add(1, reference=1), cluster.add(1, reference=1)]
    config = place.config(
        "spot",
        scaling={"cpus_per_worker": 1.5},  # a worker computes in one thread as ever, and does not fit the others' nodes
        reference={"resources_per_replica": {"reference": 1}},
    )
    slow = [{"point": "score", "do": "slow"}] * 3  # step 1 needs two chunks
    driver = place.start(config, *slow, RAY_ADDRESS=cluster.address)
    drivers.append(driver)
    driver.wait_for_step(1)
    cluster.power_off(cluster.with_worker("ReferenceReplica"))
    driver.finish()
    place.assert_like_twin("spot", twin)
    filled = place.filled("spot")
    assert (filled["lost_replicas"], filled["scored_pairs"], filled["hit_pairs"]) == (1, 200, 0)


def test_the_head_dies(place: Place, twin: str, drivers: Any, machines: Any) -> None:
    """Fault 12: with its head the cluster is lost, and the driver; on a new one the same command goes on."""
    first = machines(2)
    config = place.config("head")
    driver = place.start(config, RAY_ADDRESS=first.address)
    drivers.append(driver)
    driver.wait_for_step(10)
    first.power_off(first.cluster.head_node)
    driver.process.wait(180)
    first.cluster.shutdown()
    second = machines(2)
    again = place.start(config, RAY_ADDRESS=second.address)
    drivers.append(again)
    again.finish()
    place.assert_like_twin("head", twin)
    assert place.attempts("head")[-1]["position"] >= 8
    assert manifest.committed(place.uri("head"))[-1] == "step-00000024"
