"""What a cluster can and cannot give: `ensure_resources` refuses what could never start."""

from __future__ import annotations

import json
import math
import socket
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from dpo_ray.config import Config
from dpo_ray.errors import ConfigError
from dpo_ray.orchestration.autoscaler import Status, node_types, status
from dpo_ray.orchestration.nodes import (
    LABEL,
    PLENTY,
    Resources,
    free_resources,
    labels_as_resources,
    resources_of,
    usable_nodes,
)
from dpo_ray.orchestration.watch import Watcher

CONNECT_TIMEOUT_S = 10.0
NODE_GROUP = "ray.io/node-group"


def join_cluster(address: str, **options: Any) -> None:
    """Connects to a cluster that runs.

    Args:
        address: The value of RAY_ADDRESS.
        **options: Of `ray.init`.

    Raises:
        ConfigError: Nothing listens there, or it does not let this process in.
    """
    _ensure_cluster_answers(address)
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        raise ConfigError(
            f"RAY_ADDRESS: the Ray cluster at {address} answers, but does not let this process in "
            f"({str(error).strip().splitlines()[0]}): it may want a token (RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN "
            "here), or run another version of Ray or Python"
        ) from None


def _ensure_cluster_answers(address: str) -> None:
    """Refuses an address where nothing listens: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} ({error}): correct it, start the cluster "
            "(`ray start --head`), or unset RAY_ADDRESS to use this machine alone"
        ) from None


def ensure_resources(config: Config, workers: bool = True, references: bool = True, tokenizing: bool = False) -> None:
    """Refuses what the cluster could never start, which Ray would wait for without end.

    Args:
        config: The run.
        workers: Whether policy workers will be asked for.
        references: Whether reference actors will be.
        tokenizing: Whether tasks that tokenize will be.

    Raises:
        ConfigError: More is asked for than the cluster has, or can grow to.
    """
    asked = demands(config, workers, references, tokenizing)
    nodes = possible_nodes(name for _, _, each in asked for name in each)
    if nodes is None:
        return
    total: Resources = {}
    for key, count, each in asked:
        _ensure_labels(key, each, nodes)
        # Of a group without a limit that has none of it there is still none.
        room = sum(times * often for resources, times in nodes if (often := _how_often(each, resources)))
        if room < count:
            raise ConfigError(
                f"{key}: {count} x {as_text(each)}: the cluster has room for {as_number(room)} of them at most; "
                f"lower {key} or what each asks for, or add nodes ({_describe(nodes, each)})"
            )
        for name, amount in each.items():
            total[name] = total.get(name, 0.0) + count * amount
    for name, amount in total.items():
        most = sum(times * resources[name] for resources, times in nodes if resources.get(name))
        if amount > most:
            raise ConfigError(
                f"scaling.workers and reference.replicas: together they need {as_number(amount)} {name}, the cluster "
                f"can have at most {as_number(most)}; ask for less, add nodes, or score ahead with `dpo-ray reference`"
                + (", or set train.eval_place: workers" if config.train.eval_place == "actors" else "")
            )


def demands(
    config: Config, workers: bool = True, references: bool = True, tokenizing: bool = False
) -> list[tuple[str, int, Resources]]:
    """What a run asks for at the same time: key of the configuration, how many, and what each of them needs."""
    scaling, reference = config.scaling, config.reference
    asked: list[tuple[str, int, Resources]] = []
    if workers:
        asked.append(("scaling.workers", scaling.min_workers, needs_of_worker(config)))
    if references and config.needs_reference and reference.place != "adapter_off":
        devices = reference.least_replicas * reference.devices_per_replica
        asked.append(("reference.replicas", devices, needs_of_device(config)))
    if workers and config.train.eval_place == "actors":
        asked.append(("reference.devices_per_replica", reference.devices_per_replica, needs_of_device(config)))
    if tokenizing:
        asked.append(("data.label_selector", 1, {"CPU": 1.0, **labels_as_resources(config.data.label_selector, 1.0)}))
    return asked


def resources_per_worker(config: Config) -> Resources:
    """What each policy worker asks for."""
    scaling = config.scaling
    whole = {"CPU": scaling.cpus_per_worker, "GPU": scaling.gpus_per_worker, **scaling.resources_per_worker}
    return {name: amount for name, amount in whole.items() if amount}


def needs_of_worker(config: Config) -> Resources:
    """The same, and the labels that its node must have."""
    return {**resources_per_worker(config), **labels_as_resources(config.scaling.label_selector, 1.0)}


def resources_per_device(config: Config) -> Resources:
    """What each device of a replica of the reference asks for."""
    options = config.reference
    whole = {"CPU": options.cpus_per_replica, "GPU": options.gpus_per_replica, **options.resources_per_replica}
    return {name: amount / options.devices_per_replica for name, amount in whole.items() if amount}


def needs_of_device(config: Config) -> Resources:
    """The same, and the labels that its node must have."""
    return {**resources_per_device(config), **labels_as_resources(config.reference.label_selector, 1.0)}


def _ensure_labels(key: str, each: Resources, nodes: Sequence[tuple[Resources, float]]) -> None:
    needed = {name for name in each if name.startswith(LABEL)}
    if not needed or any(times and needed <= resources.keys() for resources, times in nodes):
        return
    # An id is a label too, but nobody's choice.
    own = f"{LABEL}ray.io/node-id="
    there = {
        name for resources, _ in nodes for name in resources if name.startswith(LABEL) and not name.startswith(own)
    }
    selector = ", ".join(name.removeprefix(LABEL).replace("=", ": ", 1) for name in each if name in needed)
    labels = ", ".join(name.removeprefix(LABEL) for name in sorted(there)) or "none"
    raise ConfigError(
        f"{key.split('.')[0]}.label_selector is {{{selector}}}: no node of the cluster has "
        f"{'all of ' * (len(needed) > 1)}that (labels there are: {labels}); correct it, leave it out, or add nodes "
        "that have it"
    )


def room(config: Config, references: bool, own: Iterable[str] = ()) -> tuple[int, list[str]]:
    """How many policy workers fit now, up to the configured maximum, and the nodes that they may be put on.

    Args:
        config: The run.
        references: Whether reference actors are there, or will be: what they need is left to them.
        own: The nodes of the workers that run now: what they hold is theirs to use again.
    """
    nodes = usable_nodes()
    (_, _, each), *others = demands(config, references=references)
    free = free_with_labels(nodes)
    for node_id, count in Counter(own).items():
        if node_id in free:
            free[node_id] = {
                name: free[node_id].get(name, 0.0) + count * each.get(name, 0.0) for name in {*free[node_id], *each}
            }
    # Reference actors that already run are not in what is free; those still to come only in what there is in all.
    fits = min(_fit_beside(list(free.values()), each, []), _fit_beside(list(nodes.values()), each, others))
    return min(fits, config.scaling.max_workers), sorted(nodes)


def free_with_labels(nodes: Mapping[str, Resources]) -> dict[str, Resources]:
    """What nobody uses on each of `nodes`, with their labels, of which Ray says nothing there."""
    return {
        node_id: {**left, **{name: amount for name, amount in nodes[node_id].items() if name.startswith(LABEL)}}
        for node_id, left in free_resources(nodes).items()
    }


def _fit_beside(nodes: Sequence[Resources], each: Resources, others: Sequence[tuple[str, int, Resources]]) -> int:
    """How often `each` fits on the nodes when all of `others` are put where they are least in its way."""
    left = [dict(node) for node in nodes]
    for _, count, other in others:
        for _ in range(count):
            without = {
                index: {name: amount - other.get(name, 0.0) for name, amount in node.items()}
                for index, node in enumerate(left)
                if _how_often(other, node)
            }
            if without:
                best = min(without, key=lambda i: _how_often(each, left[i]) - _how_often(each, without[i]))
                left[best] = without[best]
    return int(sum(_how_often(each, node) for node in left))


@dataclass(frozen=True, slots=True)
class Need:
    """Something that a run asks for, and what the cluster says to it.

    Attributes:
        key: Of the configuration.
        count: How often it is asked for.
        each: What.
        now: How often it fits on what is free.
        most: How often it could, on all nodes that there can be, if nothing else ran there; None where nobody knows.
        types: The node types of the autoscaler that would do, and how often in all.
        doing: What the autoscaler does; None where there is none.
    """

    key: str
    count: int
    each: Resources
    now: int
    most: float | None
    types: dict[str, float]
    doing: Status | None

    @property
    def impossible(self) -> bool:
        """Whether waiting is in vain."""
        return self.now < self.count and (
            self.most is not None
            and self.most < self.count
            or self.most is None
            and self.doing is not None
            and self.doing.refuses(self.each)
        )

    @property
    def remedy(self) -> str:
        """What to do where waiting is in vain."""
        section = self.key.split(".")[0]
        return f"see to {self.key} and the resources and labels of {section}, or give the cluster nodes that have them"

    def __str__(self) -> str:
        """All of it, for people to read."""
        parts = [f"{self.count} x {as_text(self.each)}: {self.now} fit now"]
        if self.now >= self.count:
            return parts[0]
        coming, failed = (
            (dict[str, int](), dict[str, str]()) if self.doing is None else (self.doing.coming, self.doing.failed)
        )
        if self.types:
            parts.append(
                "the autoscaler could add " + ", ".join(f"{as_number(n)} on {t}" for t, n in self.types.items())
            )
        elif self.doing is not None and self.most is not None:
            parts.append("no node type of the autoscaler has room for one")
        if coming:
            parts.append("on their way are " + ", ".join(f"{n} {t}" for t, n in coming.items()))
        parts += [f"{name} could not be started ({reason})" for name, reason in failed.items()]
        if self.impossible:
            parts.append("the cluster can never give all of it")
        elif self.most is None and not coming:
            parts.append("which node types there are only its autoscaler knows")
        return "; ".join(parts)


def needs(asked: Sequence[tuple[str, int, Resources]]) -> list[Need]:
    """What the cluster says to what is asked of it: to each by itself.

    Args:
        asked: Keys, counts and resources (see `demands`).
    """
    doing, nodes = status(), usable_nodes()
    free = free_with_labels(nodes)
    possible = possible_nodes(name for _, _, each in asked for name in each)
    types = node_types() or [] if doing is not None else []
    found = []
    for key, count, each in asked:
        now = int(sum(_how_often(each, have) for have in free.values()))
        most = None if possible is None else sum(n * often for have, n in possible if (often := _how_often(each, have)))
        fitting = {each_type.name: each_type.most * _how_often(each, each_type.resources) for each_type in types}
        found.append(Need(key, count, each, now, most, {name: n for name, n in fitting.items() if n}, doing))
    return found


def possible_nodes(asked: Iterable[str] = ()) -> list[tuple[Resources, float]] | None:
    """Resources of nodes, and how many such nodes there can be; None where nobody knows how far a cluster grows.

    Args:
        asked: What is asked for. Some autoscalers keep to themselves which labels their nodes have but their group's
            name: these labels they may have.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    group_of = [(node.get("Labels") or {}).get(NODE_GROUP) for node in alive]
    known = ray._private.state.state.get_cluster_config()
    groups = {group.name: group for group in known.node_group_configs} if known else {}
    if not groups and (any(group_of) or _has_autoscaler()):
        types = node_types()
        if types is None:
            return None
        own = {each.name for each in types}
        there = [(resources_of(node), 1.0) for node, group in zip(alive, group_of, strict=True) if group not in own]
        return [*there, *((each.resources, each.most) for each in types)]
    nodes = [(resources_of(node), 1.0) for node, group in zip(alive, group_of, strict=True) if group not in groups]
    labels = dict.fromkeys((name for name in asked if name.startswith(LABEL) and not _is_group(name)), PLENTY)
    for name, group in groups.items():
        resources = {name: math.inf if amount == -1 else float(amount) for name, amount in group.resources.items()}
        resources |= {**labels, **labels_as_resources({NODE_GROUP: name}, PLENTY)}
        nodes.append((resources, math.inf if group.max_count == -1 else float(group.max_count)))
    return nodes


def _is_group(name: str) -> bool:
    return name.startswith(f"{LABEL}{NODE_GROUP}=")


def check_actor_room(section: str, cpus: float, gpus: float, watcher: Watcher) -> None:
    """Warns where an actor must wait for a node to come.

    Args:
        section: Of the configuration, which asks for it.
        cpus: What it takes.
        gpus: Likewise.
        watcher: Who is warned.

    Raises:
        ConfigError: No node could ever hold it.
    """
    each = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    if any(_how_often(each, node["Resources"]) >= 1 for node in ray.nodes() if node["Alive"]):
        return
    nodes = possible_nodes(each)
    if nodes is not None and not any(_how_often(each, resources) >= 1 for resources, _ in nodes):
        raise ConfigError(
            f"{section}.cpus_per_actor and gpus_per_actor: no node has {as_text(each)}, or can have; ask for less, or "
            f"add nodes ({_describe(nodes, each)})"
        )
    watcher.warning(f"{section}: no node has room for an actor ({as_text(each)}): waiting for one")


def _has_autoscaler() -> bool:
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2(fetch_from_server=True):
        return True
    # Without an autoscaler its monitor only mirrors the nodes, each as a type of its own.
    status = json.loads(_internal_kv_get("__autoscaling_status") or "{}")
    types = (status.get("autoscaler_report") or {}).get("active_nodes") or {}
    return any(not name.startswith("node_") for name in types)


def _how_often(each: Resources, resources: Resources) -> float:
    return min((resources.get(name, 0.0) + 1e-6) // amount for name, amount in each.items())


def as_text(resources: Resources) -> str:
    """Resources for people to read; of a label there is no amount."""
    shown = (name if name.startswith(LABEL) else f"{name}: {as_number(amount)}" for name, amount in resources.items())
    return "{" + ", ".join(shown) + "}"


def as_number(value: float) -> str:
    """A number without needless digits."""
    return f"{value:g}"


def _describe(nodes: list[tuple[Resources, float]], each: Resources) -> str:
    """What there is; of the labels only those that `each` asks for."""
    hidden = ("node:", "memory", "object_store_memory", "accelerator_type:", LABEL)
    counts: Resources = {}
    for resources, times in nodes:
        shown = {name: amount for name, amount in resources.items() if name in each or not name.startswith(hidden)}
        text = as_text(dict(sorted(shown.items())))
        counts[text] = counts.get(text, 0.0) + times
    return "it has " + ", ".join(f"{as_number(times)} x {text}" for text, times in sorted(counts.items()))
