"""What a cluster can and cannot give: `ensure_resources` refuses what could never start."""

from __future__ import annotations

import json
import math
import socket
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from dpo_ray.config import Config
from dpo_ray.errors import ConfigError
from dpo_ray.orchestration.nodes import (
    LABEL,
    PLENTY,
    Resources,
    free_resources,
    labels_as_resources,
    resources_of,
    usable_nodes,
)

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


def ensure_resources(config: Config, workers: bool = True, references: bool = True) -> None:
    """Refuses what the cluster could never start, which Ray would wait for without end.

    Args:
        config: The run.
        workers: Whether policy workers will be asked for.
        references: Whether reference actors will be.

    Raises:
        ConfigError: More is asked for than the cluster has, or can grow to.
    """
    nodes = possible_nodes(config.reference.label_selector)
    if nodes is None:
        return
    total: Resources = {}
    for key, count, each in demands(config, workers, references):
        _ensure_labels(config, each, nodes)
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
            )


def demands(config: Config, workers: bool = True, references: bool = True) -> list[tuple[str, int, Resources]]:
    """What a run asks for at the same time: key of the configuration, how many, and what each of them needs."""
    scaling, reference = config.scaling, config.reference
    asked: list[tuple[str, int, Resources]] = []
    if workers:
        asked.append(
            ("scaling.workers", scaling.min_workers, {"CPU": scaling.cpus_per_worker, "GPU": scaling.gpus_per_worker})
        )
    if references and config.needs_reference and reference.place != "adapter_off":
        devices = reference.least_replicas * reference.devices_per_replica
        asked.append(("reference.replicas", devices, needs_of_device(config)))
    return [(key, count, {name: amount for name, amount in each.items() if amount}) for key, count, each in asked]


def resources_per_device(config: Config) -> Resources:
    """What each device of a replica of the reference asks for."""
    options = config.reference
    whole = {"CPU": options.cpus_per_replica, "GPU": options.gpus_per_replica, **options.resources_per_replica}
    return {name: amount / options.devices_per_replica for name, amount in whole.items() if amount}


def needs_of_device(config: Config) -> Resources:
    """The same, and the labels that its node must have."""
    return {**resources_per_device(config), **labels_as_resources(config.reference.label_selector, 1.0)}


def _ensure_labels(config: Config, each: Resources, nodes: Sequence[tuple[Resources, float]]) -> None:
    needed = {name for name in each if name.startswith(LABEL)}
    if not needed or any(times and needed <= resources.keys() for resources, times in nodes):
        return
    # An id is a label too, but nobody's choice.
    own = f"{LABEL}ray.io/node-id="
    there = {
        name for resources, _ in nodes for name in resources if name.startswith(LABEL) and not name.startswith(own)
    }
    selector = ", ".join(f"{name}: {value}" for name, value in config.reference.label_selector.items())
    labels = ", ".join(name.removeprefix(LABEL) for name in sorted(there)) or "none"
    raise ConfigError(
        f"reference.label_selector is {{{selector}}}: no node of the cluster has {'all of ' * (len(needed) > 1)}that "
        f"(labels there are: {labels}); correct it, leave it out, or add nodes that have it"
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
    free = free_resources(nodes)
    for node_id, count in Counter(own).items():
        if node_id in free:
            free[node_id] = {
                name: free[node_id].get(name, 0.0) + count * each.get(name, 0.0) for name in {*free[node_id], *each}
            }
    # Reference actors that already run are not in what is free; those still to come only in what there is in all.
    fits = min(_fit_beside(list(free.values()), each, []), _fit_beside(list(nodes.values()), each, others))
    return min(fits, config.scaling.max_workers), sorted(nodes)


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


def possible_nodes(labels: Mapping[str, str]) -> list[tuple[Resources, float]] | None:
    """Resources of nodes, and how many such nodes there can be; None where nobody knows how far a cluster grows.

    Args:
        labels: What may be asked for; an autoscaler keeps to itself which labels its groups have but their own name.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    group_of = [node.get("Labels", {}).get(NODE_GROUP) for node in alive]
    known = ray._private.state.state.get_cluster_config()
    groups = {group.name: group for group in known.node_group_configs} if known else {}
    if not groups and (any(group_of) or _has_autoscaler()):
        return None
    nodes = [(resources_of(node), 1.0) for node, group in zip(alive, group_of, strict=True) if group not in groups]
    for name, group in groups.items():
        resources = {name: math.inf if amount == -1 else float(amount) for name, amount in group.resources.items()}
        resources |= labels_as_resources({**labels, NODE_GROUP: name}, PLENTY)
        nodes.append((resources, math.inf if group.max_count == -1 else float(group.max_count)))
    return nodes


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
