"""Ray's autoscaler: what is asked of it, what it says to that, and which nodes it could start."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.data._internal.cluster_autoscaler import ResourceRequestPriority, get_or_create_autoscaling_coordinator
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpo_ray.orchestration.nodes import LABEL, PLENTY, Resources, labels_as_resources

# Who asks says so again before that; a driver that is gone is soon forgotten, and its nodes may leave.
FORGET_S = 60.0
AGAIN_S = 15.0
# The autoscaler looks every 5 s.
ANSWER_S = 12.0
LOOK_S = 2.0
ERRAND_S = 10.0


@dataclass(frozen=True, slots=True)
class NodeType:
    """Nodes that the autoscaler can start.

    Attributes:
        name: Of the node type.
        resources: Of one node, its labels among them.
        most: How many there can be.
    """

    name: str
    resources: Resources
    most: float


@dataclass(frozen=True, slots=True)
class Status:
    """What the autoscaler does.

    Attributes:
        coming: Nodes that it has asked for and that have not joined yet, by node type.
        failed: Why nodes could not be started, by node type.
        refused: What actors, tasks and placement groups wait for and it cannot give.
        unfulfilled: What is wished for, and how often, of which it cannot give all, so that it gives nothing.
    """

    coming: dict[str, int]
    failed: dict[str, str]
    refused: list[Resources]
    unfulfilled: list[tuple[Resources, int]]

    def refuses(self, each: Resources) -> bool:
        """Whether it has said that it cannot give this."""
        return each in self.refused or any(each == wished for wished, _ in self.unfulfilled)


def status() -> Status | None:
    """What the autoscaler does; None where there is none that would say it."""
    if not is_autoscaler_v2(fetch_from_server=True):
        return None
    reply = GetClusterStatusReply()
    with contextlib.suppress(Exception):  # It is asked again.
        address = ray.get_runtime_context().gcs_address
        reply.ParseFromString(ray._raylet.GcsClient(address=address).get_cluster_status(timeout_s=LOOK_S * 2))
    state = reply.autoscaling_state
    coming = Counter[str]()
    for request in state.pending_instance_requests:
        coming[request.ray_node_type_name] += request.count
    coming.update(instance.ray_node_type_name for instance in state.pending_instances)
    failed = {each.ray_node_type_name: each.reason for each in state.failed_instance_requests}
    refused = [_needs(each) for each in state.infeasible_resource_requests]
    for gang in state.infeasible_gang_resource_requests:
        refused += [_needs(each) for each in gang.requests]
        refused += [_needs(each) for selector in gang.bundle_selectors for each in selector.resource_requests]
    unfulfilled = [
        (_needs(wished.request), wished.count)
        for constraint in state.infeasible_cluster_resource_constraints
        for wished in constraint.resource_requests
    ]
    return Status(dict(coming), failed, refused, unfulfilled)


def _needs(request: Any) -> Resources:
    """A request as `demands` would write it."""
    labels = {
        constraint.label_key: constraint.label_values[0]
        for selector in request.label_selectors[:1]
        for constraint in selector.label_constraints
        if len(constraint.label_values) == 1
    }
    amounts = {name: amount for name, amount in request.resources_bundle.items() if amount}
    return {**amounts, **labels_as_resources(labels, 1.0)}


def node_types() -> list[NodeType] | None:
    """What the autoscaler can start; None where its configuration is not a file on the head, as on Kubernetes."""
    head = next((node for node in ray.nodes() if node["Alive"] and "node:__internal_head__" in node["Resources"]), None)
    if head is None:
        return None
    there = NodeAffinitySchedulingStrategy(head["NodeID"], soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(_configuration).options(scheduling_strategy=there).remote()
    try:
        config = ray.get(task, timeout=ERRAND_S)
    except (RayError, TimeoutError):
        return None
    return None if config is None else types_of(config)


def types_of(config: Mapping[str, Any]) -> list[NodeType]:
    """Types of workers' nodes of a cluster file, as `ray up` reads it."""
    in_all = float(config.get("max_workers", 0))
    types = []
    for name, about in config["available_node_types"].items():
        if name == config.get("head_node_type"):
            continue
        have = {key: float(amount) for key, amount in about.get("resources", {}).items()}
        labels = {"ray.io/node-group": name, **about.get("labels", {})}
        most = min(in_all, float(about.get("max_workers", in_all)))
        types.append(NodeType(name, {**have, **labels_as_resources(labels, PLENTY)}, most))
    return types


def _configuration() -> dict[str, Any] | None:
    """Runs on the head: the file that the autoscaler there was started with."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for argument in (process / "cmdline").read_bytes().decode(errors="replace").split("\0"):
                _, found, place = argument.partition("--autoscaling-config=")
                if found and Path(place).is_file():
                    return dict(yaml.safe_load(Path(place).read_text()))
    return None


class Wish:
    """What a run would like to have, told to the autoscaler through the one place that Ray Data and Ray Train use too.

    `request_resources` would not last: each of those overwrites it with its own, and a driver that died would keep its
    nodes for ever.
    """

    def __init__(self, name: str, each: Resources, least: int, most: int) -> None:
        """Asks for nothing yet.

        Args:
            name: Of who asks.
            each: What is asked for.
            least: How often at least.
            most: How often at most.
        """
        self._name, self._each = f"dpo_ray-{name}", each
        self._least, self._count = least, most
        self._told: int | None = None
        self._told_at = self._changed_at = self._looked_at = float("-inf")

    def tell(self) -> None:
        """Asks for nodes; to be called again and again while they are wanted.

        The autoscaler starts nothing where it cannot start everything, and keeps nothing, so that less is asked for
        when it says so.
        """
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        seen = status() if self._told else None
        if seen is not None and self._count > self._least:
            counts = [count for wished, count in seen.unfulfilled if wished == self._each]
            # Others may wish for the same: then the numbers are not ours, and only time tells what the answer is to.
            if self._told in counts or counts and now - self._changed_at > ANSWER_S:
                self._count -= 1
        if self._count != self._told:
            self._changed_at = now
        if self._count != self._told or now - self._told_at > AGAIN_S:
            with contextlib.suppress(RayError, ValueError):  # Where the head does not answer just now.
                self._send(self._count)
                self._told, self._told_at = self._count, now

    def _send(self, wanted: int) -> None:
        amounts, labels = split(self._each)
        get_or_create_autoscaling_coordinator().request_resources.remote(
            requester_id=self._name,
            resources=[amounts] * wanted,
            label_selectors=[labels] * wanted,
            expire_after_s=FORGET_S,
            priority=ResourceRequestPriority.HIGH,
        )

    def withdraw(self) -> None:
        """Asks for nothing any more."""
        with contextlib.suppress(RayError, TimeoutError):
            ray.get(get_or_create_autoscaling_coordinator().cancel_request.remote(self._name), timeout=ERRAND_S)


def split(needs: Resources) -> tuple[Resources, dict[str, str]]:
    """Amounts, and labels as Ray wants them, of what `demands` says."""
    return {name: amount for name, amount in needs.items() if not name.startswith(LABEL)}, _labels(needs)


def _labels(needs: Iterable[str]) -> dict[str, str]:
    found = (name.removeprefix(LABEL).partition("=") for name in needs if name.startswith(LABEL))
    return {name: value for name, _, value in found}
