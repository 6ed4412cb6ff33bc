"""What nodes have room for, without a cluster: where labels decide which of them count."""

from typing import Any

import pytest
import ray
from ray.core.generated import autoscaler_pb2

from dpo_ray.config import Config, parse_config
from dpo_ray.errors import ConfigError
from dpo_ray.orchestration import resources
from dpo_ray.orchestration.autoscaler import NodeType, Status
from dpo_ray.orchestration.nodes import PLENTY, labels_as_resources, resources_of
from dpo_ray.orchestration.resources import Need, as_text, demands, ensure_resources, needs, room

REFERENCE, POLICY = {"pool": "reference"}, {"pool": "policy"}


def config(
    selector: dict[str, str], workers: Any = 1, scaling: dict[str, Any] | None = None, **reference: Any
) -> Config:
    return parse_config(
        {
            "name": "run",
            "storage_path": "/s",
            "model": {"path": "/m"},
            "data": {"train": ["/p"]},
            "reference": {"label_selector": selector, **reference},
            "scaling": {"workers": workers, **(scaling or {})},
        }
    )


def node(name: str, cpus: float, labels: dict[str, str]) -> dict[str, Any]:
    """As Ray tells of it."""
    return {
        "NodeID": name,
        "Alive": True,
        "Resources": {"CPU": cpus, f"node:{name}": 1.0},
        "Labels": {"ray.io/node-id": name, **labels},
    }


def there_are(
    monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, Any], groups: autoscaler_pb2.ClusterConfig | None = None
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: list(nodes))
    monkeypatch.setattr(ray._private.state.state, "get_cluster_config", lambda: groups)
    monkeypatch.setattr(resources, "_has_autoscaler", lambda: False)
    by_id = {each["NodeID"]: resources_of(each) for each in nodes}
    monkeypatch.setattr(resources, "usable_nodes", lambda: by_id)
    monkeypatch.setattr(
        resources, "free_resources", lambda names: {each["NodeID"]: dict(each["Resources"]) for each in nodes}
    )


def test_the_room_of_the_reference_is_on_nodes_with_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    there_are(monkeypatch, node("a", 4, POLICY), node("b", 4, REFERENCE))
    many, two = {"min": 1, "max": 20}, {"replicas": 2, "cpus_per_replica": 1.5}
    assert room(config(REFERENCE, many, **two), references=True) == (4 + 1, ["a", "b"])
    assert room(config(REFERENCE, many, **two), references=False)[0] == 8
    # All replicas on the one node that has the label: of its four CPUs they leave a half.
    three = {"replicas": 3, "cpus_per_replica": 1.2}
    assert room(config(POLICY, many, **three), references=True)[0] == 0 + 4
    # Where any node will do they share the least useful rests.
    there_are(monkeypatch, node("a", 4.2, POLICY), node("b", 4, REFERENCE))
    assert room(config({}, many, cpus_per_replica=1.2), references=True)[0] == 7
    assert room(config(REFERENCE, many, cpus_per_replica=1.2), references=True)[0] == 6


def test_a_label_that_no_node_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    there_are(monkeypatch, node("a", 4, {**POLICY, "zone": "x"}), node("b", 2, REFERENCE))
    ensure_resources(config(REFERENCE, replicas=2))
    with pytest.raises(
        ConfigError,
        match=r"reference.label_selector is {pool: gold}: no node of the cluster has that "
        r"\(labels there are: pool=policy, pool=reference, zone=x\); correct it, leave it out, or add nodes",
    ):
        ensure_resources(config({"pool": "gold"}))
    # Each of them somewhere, but not together.
    with pytest.raises(ConfigError, match=r"is {pool: reference, zone: x}: no node of the cluster has all of that"):
        ensure_resources(config({**REFERENCE, "zone": "x"}))
    with pytest.raises(
        ConfigError,
        match=r"reference.replicas: 3 x {CPU: 1, label pool=reference}: the cluster has room for 2 of them at most.*"
        r"\(it has 1 x {CPU: 2, label pool=reference}, 1 x {CPU: 4}\)",
    ):
        ensure_resources(config(REFERENCE, replicas=3))
    # Scores that are there already ask for nothing.
    ensure_resources(config({"pool": "gold"}), references=False)


def test_workers_go_where_their_label_is(monkeypatch: pytest.MonkeyPatch) -> None:
    there_are(monkeypatch, node("a", 4, POLICY), node("b", 2, REFERENCE))
    many = {"min": 1, "max": 20}
    labelled = {"label_selector": POLICY}
    assert room(config({}, many), references=False)[0] == 4 + 2
    assert room(config({}, many, labelled), references=False)[0] == 4
    # A reference without one takes the room that is of no use to workers.
    assert room(config({}, many, labelled, replicas=2), references=True)[0] == 4
    assert room(config(POLICY, many, labelled, replicas=1), references=True)[0] == 3
    with pytest.raises(ConfigError, match=r"scaling.workers: 5 x {CPU: 1, label pool=policy}: .* room for 4 of them"):
        ensure_resources(config({}, 5, labelled))
    with pytest.raises(ConfigError, match=r"scaling.label_selector is {pool: gold}: no node of the cluster has that"):
        ensure_resources(config({}, 1, {"label_selector": {"pool": "gold"}}))
    own = config({}, 1, {"resources_per_worker": {"policy": 1}})
    with pytest.raises(ConfigError, match=r"scaling.workers: 1 x {CPU: 1, policy: 1}: the cluster has room for 0"):
        ensure_resources(own)


def test_what_a_run_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    types = [
        NodeType("policy", {"CPU": 2.0, **labels_as_resources(POLICY, PLENTY)}, 3),
        NodeType("reference", {"CPU": 1.0, **labels_as_resources(REFERENCE, PLENTY)}, 8),
    ]
    doing = Status({"policy": 1}, {"reference": "no quota"}, [], [])

    def said(number: int, config: Config) -> Need:
        return needs(demands(config, tokenizing=True))[number]

    there_are(monkeypatch, node("head", 0, {}))
    monkeypatch.setattr(resources, "_has_autoscaler", lambda: True)
    monkeypatch.setattr(resources, "status", lambda: doing)
    monkeypatch.setattr(resources, "node_types", lambda: types)
    run = config(REFERENCE, 6, {"label_selector": POLICY}, replicas=9)
    ahead = "on their way are 1 policy; reference could not be started (no quota)"
    workers = said(0, run)
    assert str(workers) == (
        f"6 x {{CPU: 1, label pool=policy}}: 0 fit now; the autoscaler could add 6 on policy; {ahead}"
    )
    assert not workers.impossible
    assert said(1, run).impossible
    assert str(said(1, run)).endswith("8 on reference; " + ahead + "; the cluster can never give all of it")
    assert "0 fit now; the autoscaler could add 6 on policy, 8 on reference;" in str(said(2, run))
    gold = said(0, config({}, 1, {"label_selector": {"pool": "gold"}}))
    assert gold.impossible
    assert "no node type of the autoscaler has room for one" in str(gold)
    assert gold.remedy == (
        "see to scaling.workers and the resources and labels of scaling, or give the cluster nodes that have them"
    )
    # An autoscaler that keeps to itself what it can do still says what it cannot.
    monkeypatch.setattr(resources, "node_types", lambda: None)
    assert not said(0, run).impossible
    doing.unfulfilled.append(({"CPU": 1.0, **labels_as_resources(POLICY, 1.0)}, 6))
    assert said(0, run).impossible
    assert not said(2, run).impossible


def test_a_cluster_without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    there_are(monkeypatch, node("a", 4, {}))
    with pytest.raises(ConfigError, match=r"\(labels there are: none\)"):
        ensure_resources(config(REFERENCE))


def test_node_groups_may_have_any_label_but_another_group_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = autoscaler_pb2.ClusterConfig()
    groups.node_group_configs.add(name="spot", resources={"CPU": 2}, max_count=2)
    there_are(monkeypatch, node("a", 4, POLICY), groups=groups)
    ensure_resources(config(REFERENCE, replicas=4))
    ensure_resources(config({"ray.io/node-group": "spot"}, replicas=4))
    with pytest.raises(ConfigError, match=r"replicas: 5 x .*room for 4"):
        ensure_resources(config(REFERENCE, replicas=5))
    with pytest.raises(ConfigError, match=r"is {ray.io/node-group: gpu}: no node .*ray.io/node-group=spot"):
        ensure_resources(config({"ray.io/node-group": "gpu"}))
    groups.node_group_configs[0].max_count = -1
    ensure_resources(config(REFERENCE, replicas=100))
    with pytest.raises(ConfigError, match=r"replicas: 1 x {CPU: 1, GPU: 1, label pool=reference}: .* room for 0"):
        ensure_resources(config(REFERENCE, gpus_per_replica=1))


def test_nobody_knows_how_far_a_cluster_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    there_are(monkeypatch, node("a", 4, {}))
    monkeypatch.setattr(resources, "_has_autoscaler", lambda: True)
    ensure_resources(config({"pool": "gold"}))


def test_what_people_read() -> None:
    (_, _, workers), (_, _, reference) = demands(config({**REFERENCE, "zone": "x"}, devices_per_replica=2))
    assert as_text(workers) == "{CPU: 1}"
    assert as_text(reference) == "{CPU: 0.5, label pool=reference, label zone=x}"


def test_the_room_of_an_evaluation_beside_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is kept as long as there are workers: of five CPUs two devices of half a CPU each leave four."""
    there_are(monkeypatch, node("a", 5, {}))
    held = {"train": {"eval_every_steps": 1, "eval_place": "actors"}, "data": {"train": ["/p"], "eval": ["/e"]}}
    many = config({}, {"min": 1, "max": 20}, devices_per_replica=2, cpus_per_replica=1.0)
    beside = parse_config({**many.model_dump(exclude_defaults=True), **held})
    assert room(many, references=False)[0] == 5
    assert room(beside, references=False)[0] == 4
    assert room(beside, references=True)[0] == 3
    assert [key for key, *_ in demands(beside, workers=False)] == ["reference.replicas"]
    too_many = parse_config({**beside.model_dump(exclude_defaults=True), "scaling": {"workers": 5}})
    with pytest.raises(ConfigError, match="together they need 6 CPU, .* or set train.eval_place: workers"):
        ensure_resources(too_many, references=False)
