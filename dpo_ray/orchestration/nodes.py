"""Nodes: which of them answer, what is free on them, and errands to them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpo_ray.lease import process_start
from dpo_ray.orchestration.monitor import Place

CONNECT_S = 3.0
# A process of Ray's may have to start for an errand.
ERRAND_S = 20.0

# Linux's request for the address of an interface, and what names the interface to gloo.
_SIOCGIFADDR = 0x8915
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"

Resources = dict[str, float]
# A node's label counts as a resource of this prefix, of which it has plenty; who needs the label asks for 1.
LABEL, PLENTY = "label ", 1e9


def labels_as_resources(labels: Mapping[str, str], amount: float) -> Resources:
    """Labels as resources: `label pool=reference`."""
    return {f"{LABEL}{name}={value}": amount for name, value in labels.items()}


def resources_of(node: Mapping[str, Any]) -> Resources:
    """What a node has in all, its labels among it."""
    return {**node["Resources"], **labels_as_resources(node.get("Labels") or {}, PLENTY)}


def usable_nodes() -> dict[str, Resources]:
    """What each node has in all, by its id: nodes that answer now and are not about to be drained.

    Ray itself believes for up to half a minute in a node that has died.
    """
    leaving = draining_nodes()
    alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    with ThreadPoolExecutor(max(1, min(64, len(alive)))) as pool:
        answers = list(pool.map(_answers, alive))
    return {node["NodeID"]: resources_of(node) for node, answer in zip(alive, answers, strict=True) if answer}


def node_name(node_id: str) -> str:
    """A node for people: its host's name, its address and its id."""
    for node in ray.nodes():
        if node["NodeID"] == node_id:
            return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node_id})"
    return node_id


def _answers(node: Mapping[str, Any]) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=CONNECT_S).close()
        return True
    return False


def lead_gloo() -> None:
    """Has gloo take the address by which Ray's nodes know this one, unless the environment names an interface.

    By itself it takes that of the host's name, which on many machines is 127.0.1.1: others cannot reach it.
    """
    own = ray.util.get_node_ip_address()
    interface = next((name for name, address in _interfaces() if address == own), None)
    if interface is not None and not own.startswith("127."):
        os.environ.setdefault(GLOO_INTERFACE, interface)


def gloo_address() -> str:
    """The address that gloo takes in this process, as text; empty where there is none."""
    if name := os.environ.get(GLOO_INTERFACE):
        return dict(_interfaces()).get(name.partition(",")[0], "")
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _interfaces() -> Iterator[tuple[str, str]]:
    """This machine's network interfaces with their IPv4 addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # It has none.
                answer = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                yield name, socket.inet_ntoa(answer[20:24])


def draining_nodes() -> dict[str, int]:
    """Nodes that will go, by id, and when: milliseconds since the epoch, 0 where nobody said."""
    return dict(ray._private.state.state.get_draining_nodes())


def free_resources(nodes: Iterable[str]) -> dict[str, Resources]:
    """What nobody uses on each of `nodes`."""
    free = ray._private.state.available_resources_per_node()
    return {node_id: dict(free.get(node_id, {})) for node_id in nodes}


def on_nodes(errand: Callable[[Place], Any], places: Mapping[int, Place]) -> dict[int, Any]:
    """Runs an errand for each worker on the worker's node; None for those whose node does not answer."""
    usable, here = usable_nodes(), ray.get_runtime_context().get_node_id()
    task = ray.remote(num_cpus=0, max_retries=0)(errand)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(place.node_id, soft=False)).remote(place): rank
        for rank, place in places.items()
        if place.node_id in usable and place.node_id != here
    }
    found: dict[int, Any] = dict.fromkeys(places)
    near = {rank: place for rank, place in places.items() if place.node_id == here}
    with ThreadPoolExecutor(len(near) or 1) as pool:
        answers = {rank: pool.submit(errand, place) for rank, place in near.items()}
    for rank, answer in answers.items():
        with contextlib.suppress(OSError):  # Of a process that is just going.
            found[rank] = answer.result()
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=ERRAND_S) if asked else ([], [])
    for ref in done:
        with contextlib.suppress(RayError):
            found[asked[ref]] = ray.get(ref)
    for ref in late:
        ray.cancel(ref, force=True)
    return found


def kill(place: Place) -> None:
    """Ends a process, whatever it is doing, and sees it gone."""
    deadline = time.monotonic() + ERRAND_S / 2
    while process_start(place.pid) == place.started and time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):
            os.kill(place.pid, signal.SIGKILL)
        time.sleep(0.05)


def look_at(place: Place) -> str:
    """What can be seen of a worker's process from outside: its state, and its threads' stacks where py-spy may look."""
    if process_start(place.pid) != place.started:
        return "the process is gone"
    status = Path(f"/proc/{place.pid}/status").read_text().splitlines()
    seen = [line for line in status if line.startswith("State:")]
    beside = Path(sys.executable).with_name("py-spy")
    spy = str(beside) if beside.exists() else shutil.which("py-spy")
    if spy is not None:
        command = [spy, "dump", "--nonblocking", "--pid", str(place.pid)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, timeout=ERRAND_S / 2, check=False)
            seen.append(done.stdout or done.stderr)
    return "\n".join(seen)
