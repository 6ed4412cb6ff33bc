"""Replicas of the reference on a cluster of two raylets with different labels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from helpers import tiny_config, write_pairs
from ray.cluster_utils import Cluster

from dpo_ray.errors import ConfigError
from dpo_ray.orchestration import replicas
from dpo_ray.orchestration.reference_job import fill_reference

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
NUM_PAIRS = 60


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[str, str]]:
    """The node of each pool; either has room for all replicas of a test."""
    if ray.is_initialized():
        ray.shutdown()
    made = Cluster()
    nodes = {
        "policy": made.add_node(num_cpus=4, labels={"pool": "policy", "zone": "x"}, include_dashboard=False),
        "reference": made.add_node(num_cpus=4, labels={"pool": "reference"}),
    }
    ray.init(address=made.address, log_to_driver=False)
    yield {name: node.node_id for name, node in nodes.items()}
    ray.shutdown()
    made.shutdown()


@pytest.mark.parametrize("pool", ["policy", "reference"])
@pytest.mark.parametrize("options", [{"replicas": 2}, {"devices_per_replica": 2}], ids=["two", "sharded"])
def test_replicas_are_where_the_label_is(
    pools: dict[str, str],
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    pool: str,
    options: dict[str, Any],
) -> None:
    scored, seen = replicas.ReferenceReplica.score, tmp_path / "seen"
    seen.mkdir()

    def noted(self: replicas.ReferenceReplica, chunk: Any) -> int:
        context = ray.get_runtime_context()
        (seen / f"{context.get_node_id()}-{context.get_actor_id()}").touch()
        # One that is up early must not do the other's work too.
        while len(list(seen.iterdir())) < 2:
            time.sleep(0.02)
        return scored(self, chunk)

    noted.__module__ = "__main__"
    changed = type("Noted", (replicas.ReferenceReplica,), {"score": noted, "__module__": "__main__"})
    monkeypatch.setattr(replicas, "ReferenceReplica", changed)
    config = tiny_config(
        str(tmp_path / "storage"),
        "run",
        tiny_model,
        write_pairs(tmp_path / "pairs.jsonl", NUM_PAIRS),
        data={"chunk_pairs": 4},
        reference={"label_selector": {"pool": pool}, **options},
    )
    filled, _ = fill_reference(config)
    assert (filled.scored_pairs, filled.lost_replicas) == (NUM_PAIRS, 0)
    found = [path.name.split("-") for path in seen.iterdir()]
    assert {node for node, _ in found} == {pools[pool]}
    assert len(found) == 2


def test_a_label_that_no_node_has(pools: dict[str, str], tmp_path: Path, tiny_model: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", NUM_PAIRS)
    selector = {"pool": "reference", "zone": "x"}
    config = tiny_config(str(tmp_path / "storage"), "run", tiny_model, pairs, reference={"label_selector": selector})
    with pytest.raises(
        ConfigError,
        match=r"reference.label_selector is {pool: reference, zone: x}: no node of the cluster has all of that "
        r"\(labels there are: pool=policy, pool=reference, zone=x\)",
    ):
        fill_reference(config)
