"""Before a run: what `dpo-ray doctor` shows."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.errors import ConfigError, DpoRayError, first_line
from dpo_ray.model.files import (
    check_quantize,
    check_trainable,
    check_vocabulary,
    load_tokenizer,
    model_config,
)
from dpo_ray.orchestration.nodes import GLOO_INTERFACE, gloo_address, lead_gloo
from dpo_ray.orchestration.prepare import survey
from dpo_ray.orchestration.resources import as_number, demands, ensure_resources, needs, possible_nodes
from dpo_ray.orchestration.watch import SourcePreview, Watcher
from dpo_ray.pairs.tokenize import Limits, PairTokenizer
from dpo_ray.training.optimizer import check_optimizer

Level = Literal["ok", "note", "wrong"]

PACKAGES = ("dpo_ray", "ray", "torch", "transformers")
NODE_TIMEOUT_S = 120.0
# Storage that fails is reported, not waited for.
PATIENCE_S = 5.0
MAX_CLOCK_SKEW_S = 2.0
# Ray stops spilling to a disk that is fuller than this.
MAX_DISK_USED = 0.95
MIN_SHM_BYTES = 2**30
GIB = 2**30
_DRIVER = "driver"


@dataclass(frozen=True, slots=True)
class Row:
    """One finding.

    Attributes:
        check: What was looked at.
        where: On which node, or at which place.
        level: `wrong` would stop or spoil a run; a `note` would not.
        result: What was found.
        mend: What to do about it.
    """

    check: str
    where: str
    level: Level
    result: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What a node tells about itself.

    Attributes:
        versions: Of Python and the packages that must be the same everywhere.
        num_gpus: GPUs that torch has computed on.
        gpu_error: Why it could not.
        disk: Bytes free and bytes in all where Ray keeps its temporary files.
        shm_free: Bytes free in shared memory; None where there is none.
        storage_error: Why the marker could not be written.
        unreadable: What this node cannot read of the model and the data, and why.
        asks_for_token: Whether Ray wants a token there.
        gloo: The address that gloo takes there.
    """

    versions: dict[str, str]
    num_gpus: int
    gpu_error: str
    disk: tuple[int, int]
    shm_free: int | None
    storage_error: str
    unreadable: list[str]
    asks_for_token: bool
    gloo: str


def examine(config: Config, connect: Callable[[], None]) -> list[Row]:
    """Looks at everything that a run needs; a check that fails is a row too, and waits for nothing for long.

    Args:
        config: The run.
        connect: Connects to Ray, or starts it.
    """
    with storage.patience(PATIENCE_S):
        return _examine(config, connect)


def _examine(config: Config, connect: Callable[[], None]) -> list[Row]:
    probe = storage.join(config.storage_path, f".doctor-{uuid.uuid4().hex}")
    rows = _guarded("storage", "this machine", lambda: _check_storage(config.storage_path, probe))
    rows += _guarded("pairs", "this machine", lambda: _check_data(config))
    rows += _guarded("model", config.model.path, lambda: _check_model(config))
    if config.needs_reference and config.reference_path != config.model.path:
        rows += _guarded("reference", config.reference_path, lambda: _check_weights("reference", config.reference_path))
    if all(row.level != "wrong" for row in rows):
        rows += _guarded("format", "this machine", lambda: _check_format(config))
    connected = _guarded("Ray", os.environ.get("RAY_ADDRESS") or "this machine", lambda: _connect(connect))
    rows += connected
    if all(row.level == "ok" for row in connected):
        rows += _guarded("room", "cluster", lambda: _check_room(config))
        rows += _guarded("resources", "cluster", lambda: _check_resources(config))
        rows += _guarded("nodes", "cluster", lambda: _check_nodes(config, probe))
    _guarded("storage", "this machine", lambda: storage.remove(probe) or [])
    return _merged(rows)


def _guarded(check: str, where: str, look: Callable[[], list[Row]]) -> list[Row]:
    try:
        return look()
    except Exception as error:
        return [Row(check, where, "wrong", _message(error), "as the result says")]


def _message(error: BaseException) -> str:
    """What an error says, without what Ray wraps around it."""
    cause = getattr(error, "cause", None)
    inner = cause if isinstance(cause, BaseException) else error
    return str(inner) if isinstance(inner, DpoRayError) else f"{type(inner).__name__}: {first_line(inner)}"


def _merged(rows: Iterable[Row]) -> list[Row]:
    """Equal findings of several nodes as one row."""
    places: dict[tuple[str, Level, str, str], list[str]] = {}
    for row in rows:
        places.setdefault((row.check, row.level, row.result, row.mend), []).append(row.where)
    merged = []
    for (check, level, result, mend), where in places.items():
        more = f" and {len(where) - 3} more" if len(where) > 3 else ""
        merged.append(Row(check, ", ".join(where[:3]) + more, level, result, mend))
    return merged


def _connect(connect: Callable[[], None]) -> list[Row]:
    connect()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [Row("Ray", os.environ.get("RAY_ADDRESS") or "this machine", "ok", f"{len(nodes)} nodes alive")]


def _check_storage(place: str, probe: str) -> list[Row]:
    storage.check_reachable(place)
    uri = storage.join(probe, _DRIVER)
    storage.write_bytes(uri, uri.encode())
    if storage.read_bytes(uri) != uri.encode() or storage.list_names(probe) != [_DRIVER]:
        return [Row("storage", place, "wrong", "what was written is not what is read", "use another storage_path")]
    rows = [Row("storage", "this machine", "ok", f"{place} can be read and written")]
    once = storage.join(probe, "once")
    first, second = storage.create(once, b"first"), storage.create(once, b"second")
    if (first, second) == (True, False):
        return [*rows, Row("conditional writes", place, "ok", "supported")]
    mend = "see to it that no run is started twice at the same moment"
    return [*rows, Row("conditional writes", place, "note", "not supported by this server", mend)]


def _check_data(config: Config) -> list[Row]:
    rows = []
    for _, pattern in config.data.sources:
        files = storage.expand(pattern)
        num_bytes = sum(file.num_bytes for file in files)
        rows.append(Row("pairs", pattern, "ok", f"{len(files)} files, {num_bytes:,} bytes"))
    return rows


def _check_format(config: Config) -> list[Row]:
    """How the pairs are written, by their first rows."""
    watcher = _Previews()
    survey(config, watcher)
    rows = [Row("format", config.store_uri, "ok", "the pair store is there already")] if not watcher.previews else []
    for preview in watcher.previews:
        level: Level = "note" if preview.problem else "ok"
        rows.append(Row("format", preview.pattern, level, preview.reading.format, preview.problem or ""))
    return rows


class _Previews(Watcher):
    def __init__(self) -> None:
        self.previews: list[SourcePreview] = []

    def source(self, preview: SourcePreview) -> None:
        self.previews.append(preview)


def _check_model(config: Config) -> list[Row]:
    """The policy: its weights are whole, its tokenizer loads, fits and can do what the configuration asks."""
    rows = _check_weights("model", config.model.path)
    tokenizer_uri = config.tokenizer_path
    try:
        if not any(row.level == "wrong" for row in rows):
            check_trainable(config.model.path)
            check_quantize(config.adapter.quantize, config.model.path)
            check_optimizer(config.optimizer)
    except ConfigError as error:
        rows.append(Row("model", config.model.path, "wrong", str(error), "as the result says"))
    try:
        tokenizer = load_tokenizer(tokenizer_uri)
        check_vocabulary(config.model.path, tokenizer)
        data = config.data
        PairTokenizer(tokenizer, data.chat_template, Limits(data.max_length), None, data.chat_template_kwargs)
    except ConfigError as error:
        return [*rows, Row("tokenizer", tokenizer_uri, "wrong", str(error), "as the result says")]
    return [*rows, Row("tokenizer", tokenizer_uri, "ok", f"{len(tokenizer)} tokens, as the model has or fewer")]


def _check_weights(check: str, uri: str) -> list[Row]:
    """A model's configuration and, by their headers alone, its weights."""
    if not storage.exists(storage.join(uri, "config.json")):
        return [Row(check, uri, "wrong", "no config.json there", "give a transformers directory (local or s3://)")]
    model_type = model_config(uri).model_type
    names = storage.list_names(uri)
    files = [name for name in names if name.endswith(".safetensors")]
    problems, tensors = [], dict[str, str]()
    for name in files:
        found = _tensors(storage.join(uri, name))
        if isinstance(found, str):
            problems.append(f"{name}: {found}")
        else:
            tensors.update(dict.fromkeys(found, name))
    if not files:
        problems.append("no .safetensors file there")
    for name in names:
        if name.endswith(".safetensors.index.json"):
            promised = storage.read_json(storage.join(uri, name))["weight_map"]
            missing = sorted({file for tensor, file in promised.items() if tensors.get(tensor) != file})
            problems += [f"{file}: lacks what {name} promises" for file in missing if not _named(problems, file)]
    if problems:
        return [Row(check, uri, "wrong", "; ".join(problems), "copy the model again, as .safetensors files")]
    return [Row(check, uri, "ok", f"{model_type}, {len(tensors)} tensors in {len(files)} files, all there")]


def _named(problems: list[str], file: str) -> bool:
    return any(problem.startswith(f"{file}:") for problem in problems)


def _tensors(uri: str) -> list[str] | str:
    """Names of the tensors of a safetensors file, or what is wrong with it; their data are not read."""
    size = storage.size(uri)
    try:
        (header_bytes,) = struct.unpack("<Q", storage.read_bytes(uri, 0, 8))
        header = json.loads(storage.read_bytes(uri, 8, 8 + header_bytes)) if 8 + header_bytes <= size else None
    except (struct.error, ValueError):
        return "not a safetensors file"
    if header is None:
        return f"cut off: {size} bytes, its header alone has {header_bytes}"
    header.pop("__metadata__", None)
    whole = 8 + header_bytes + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    return list(header) if size == whole else f"{size} bytes instead of {whole}"


def _check_room(config: Config) -> list[Row]:
    """What the run will ask for, and what the cluster says to that."""
    rows = []
    for need in needs(demands(config, tokenizing=True)):
        if need.now >= need.count:
            rows.append(Row("room", need.key, "ok", str(need)))
        elif need.impossible:
            rows.append(Row("room", need.key, "wrong", str(need), need.remedy))
        else:
            rows.append(Row("room", need.key, "note", str(need), "nothing: the run waits for it"))
    return rows


def _check_resources(config: Config) -> list[Row]:
    ensure_resources(config)
    ensure_resources(config, workers=False, references=False, tokenizing=True)
    if possible_nodes() is None:
        return [Row("resources", "cluster", "note", "how far the autoscaler goes is not known")]
    return [Row("resources", "cluster", "ok", "all that is asked for at the same time has room")]


def _asks_for_token() -> bool:
    """Whether Ray's servers on this node ask for one. A client may send it to a cluster that does not."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return bool(is_token_auth_enabled())


def _authentication_row(where: str, asks: bool, address: str) -> Row:
    """Whoever reaches a node without it can run code there; on loopback that is this machine's users alone."""
    if asks:
        return Row("authentication", where, "ok", "token authentication is on")
    if not os.environ.get("RAY_ADDRESS"):
        return Row("authentication", where, "ok", "not needed: Ray of this machine alone")
    dashboard = ray._private.worker.get_dashboard_url() or ""
    mend = "`ray get-auth-token --generate`, then RAY_AUTH_MODE=token on all nodes and clients"
    if not _is_loopback(urlsplit(f"//{dashboard}").hostname):
        return Row("authentication", where, "wrong", f"off, and the dashboard listens on {dashboard}", mend)
    if _is_loopback(address):
        return Row("authentication", where, "note", "off; the dashboard listens on loopback only", mend)
    # Of the dashboard only; Ray's other ports let in whoever may run code too.
    result = "off: who reaches this node over the network can run code on it, though not by the dashboard"
    return Row("authentication", where, "note", result, mend)


def _is_loopback(host: str | None) -> bool:
    return host in (None, "localhost", "::1") or str(host).startswith("127.")


def _network_row(where: str, gloo: str, num_hosts: int) -> Row:
    """Workers of several hosts find one another by the address that gloo takes."""
    if num_hosts < 2 or gloo and not _is_loopback(gloo):
        return Row("network", where, "ok", "workers can be reached from other nodes")
    mend = (
        f"name the interface in {GLOO_INTERFACE} in the node's environment, or give its name an address in /etc/hosts"
    )
    return Row("network", where, "wrong", f"gloo would take {gloo or 'no address'}: others cannot reach that", mend)


def _check_nodes(config: Config, probe: str) -> list[Row]:
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    where = {node_id: f"{node['NodeManagerHostname']} {node_id[:6]}" for node_id, node in nodes.items()}
    markers = {node_id: storage.join(probe, node_id) for node_id in nodes}
    inputs = _inputs(config)
    looks = {
        node_id: _on(node_id, _look).remote(markers[node_id], inputs, bool(nodes[node_id]["Resources"].get("GPU")))
        for node_id in nodes
    }
    reports, rows = _gather(looks, where)
    own = _versions()
    addresses = {node_id: node["NodeManagerAddress"] for node_id, node in nodes.items()}
    for node_id, report in reports.items():
        rows += _rows_of(report, where[node_id], nodes[node_id]["Resources"].get("GPU", 0.0), own)
        rows.append(_authentication_row(where[node_id], report.asks_for_token, addresses[node_id]))
        rows.append(_network_row(where[node_id], report.gloo, len(set(addresses.values()))))
    written = {node_id: markers[node_id] for node_id, report in reports.items() if not report.storage_error}
    where[_DRIVER], markers[_DRIVER] = "this machine", storage.join(probe, _DRIVER)
    if storage.exists(markers[_DRIVER]):
        written[_DRIVER] = markers[_DRIVER]
    reads = {node_id: _on(node_id, _read).remote(written) for node_id in reports}
    unread, failed = _gather(reads, where)
    unread[_DRIVER] = _read(written)
    for node_id, missing in unread.items():
        if missing:
            result = f"cannot read what was written on {', '.join(where[other] for other in missing)}"
            mend = "storage_path must be one place for all nodes: shared, or s3://"
            rows.append(Row("storage", where[node_id], "wrong", result, mend))
        elif node_id in reports and node_id in written:
            rows.append(Row("storage", where[node_id], "ok", "written; what all nodes wrote is read"))
    if any(unread.values()):  # Each has its own place, that this machine cannot clean.
        _gather({node_id: _on(node_id, storage.remove).remote(probe) for node_id in reports}, where)
    for node_id in reports:
        before = time.time()
        (now, late) = _gather({node_id: _on(node_id, _now).remote()}, where)
        rows += late or [_clock_row(where[node_id], before, now[node_id], time.time())]
    return [*rows, *failed]


def _on(node_id: str, function: Callable[..., Any]) -> Any:
    return ray.remote(function).options(
        num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
    )


def _gather(tasks: dict[str, Any], where: dict[str, str]) -> tuple[dict[str, Any], list[Row]]:
    """Results of the nodes that gave one in time, and a row for each other."""
    ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=NODE_TIMEOUT_S)
    results, rows = {}, []
    for node_id, task in tasks.items():
        try:
            results[node_id] = ray.get(task, timeout=0.1)
        except ray.exceptions.GetTimeoutError:
            result = f"a task did not end in {NODE_TIMEOUT_S:g} s"
            rows.append(Row("node", where[node_id], "wrong", result, "look at the node's load and logs, or replace it"))
        except Exception as error:
            mend = "install there what is installed here"
            rows.append(Row("node", where[node_id], "wrong", f"a task failed: {_message(error)}", mend))
    return results, rows


def _inputs(config: Config) -> list[str]:
    """One object of each thing that nodes must be able to read."""
    models = {config.model.path, config.tokenizer_path, config.reference_path}
    inputs = [storage.join(uri, "config.json") for uri in sorted(models)]
    for _, pattern in config.data.sources:
        try:
            inputs.append(storage.expand(pattern)[0].uri)
        except DpoRayError:
            continue  # This machine's check has told.
    return inputs


def _look(marker: str, inputs: list[str], has_gpus: bool) -> NodeReport:
    """What runs on each node."""
    storage_error, unreadable = "", []
    with storage.patience(PATIENCE_S):
        try:
            storage.write_bytes(marker, marker.encode())
        except DpoRayError as error:
            storage_error = str(error)
        for uri in inputs:
            try:
                if not storage.exists(uri):
                    unreadable.append(f"{uri} is not there")
            except DpoRayError as error:
                unreadable.append(str(error))
    usage = shutil.disk_usage(ray._private.worker._global_node.get_session_dir_path())
    shm_free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None
    num_gpus, gpu_error = _compute_on_gpus() if has_gpus else (0, "")
    lead_gloo()
    return NodeReport(
        versions=_versions(),
        num_gpus=num_gpus,
        gpu_error=gpu_error,
        disk=(usage.free, usage.total),
        shm_free=shm_free,
        storage_error=storage_error,
        unreadable=unreadable,
        asks_for_token=_asks_for_token(),
        gloo=gloo_address(),
    )


def _read(markers: dict[str, str]) -> list[str]:
    """Nodes whose markers this node does not see as they were written."""
    missing = []
    for node_id, marker in markers.items():
        try:
            with storage.patience(PATIENCE_S):
                if storage.read_bytes(marker) != marker.encode():
                    missing.append(node_id)
        except (FileNotFoundError, DpoRayError):
            missing.append(node_id)
    return missing


def _now() -> float:
    return time.time()


def _compute_on_gpus() -> tuple[int, str]:
    code = (
        "import torch\nfor i in range(torch.cuda.device_count()):\n"
        " assert (torch.ones(8, device=i) * 2).sum().item() == 16\n print(i, flush=True)"
    )
    # Ray may hide the GPUs from a task that asks for none. A process of its own leaves no memory taken on them.
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=NODE_TIMEOUT_S / 2
    )
    return len(done.stdout.split()), (done.stderr.strip().splitlines() or [""])[-1] if done.returncode else ""


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _rows_of(report: NodeReport, where: str, gpus: float, own: dict[str, str]) -> list[Row]:
    rows = []
    if report.storage_error:
        mend = "the node needs the same path, credentials and rights as this machine"
        rows.append(Row("storage", where, "wrong", report.storage_error, mend))
    if report.unreadable:
        mend = "put model and pairs where all nodes can read them, e.g. s3://"
        rows.append(Row("model and pairs", where, "wrong", "; ".join(report.unreadable), mend))
    else:
        rows.append(Row("model and pairs", where, "ok", "readable"))
    differing = [name for name, version in report.versions.items() if version != own[name]]
    other = [f"{name} {report.versions[name]} (here {own[name]})" for name in differing]
    if other:
        rows.append(Row("versions", where, "wrong", ", ".join(other), "install the same versions on all nodes"))
    else:
        rows.append(Row("versions", where, "ok", ", ".join(f"{name} {version}" for name, version in own.items())))
    if gpus:
        good = report.num_gpus >= gpus
        result = f"torch computes on {report.num_gpus} of {as_number(gpus)} GPUs {report.gpu_error}".strip()
        rows.append(Row("GPUs", where, "ok" if good else "wrong", result, "" if good else "see to driver and torch"))
    free, total = report.disk
    full = free < (1 - MAX_DISK_USED) * total
    result = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    rows.append(Row("disk", where, "wrong" if full else "ok", result, "free space in Ray's folder" if full else ""))
    if report.shm_free is not None:
        low = report.shm_free < MIN_SHM_BYTES
        mend = "give /dev/shm more (docker --shm-size): Ray's objects would go through the disk" if low else ""
        rows.append(Row("shared memory", where, "note" if low else "ok", f"{report.shm_free / GIB:.1f} GiB free", mend))
    return rows


def _clock_row(where: str, before: float, there: float, after: float) -> Row:
    """Judges a node's clock by a time taken there between two times taken here."""
    at_least, at_most = max(before - there, there - after, 0.0), max(after - there, there - before)
    if at_least > MAX_CLOCK_SKEW_S:
        return Row("clock", where, "wrong", f"differs by {at_least:.1f} s or more", "synchronize the clocks (NTP)")
    if at_most > MAX_CLOCK_SKEW_S:
        return Row("clock", where, "note", f"within {at_most:.1f} s: the node answers too slowly to say more")
    return Row("clock", where, "ok", f"within {MAX_CLOCK_SKEW_S:g} s of this machine's")
