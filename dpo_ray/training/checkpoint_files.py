"""The files of a checkpoint: safetensors of each rank and a layout, written with their digests, verified when read.

DCP plans which rank writes and reads what. Nothing here is pickled to storage, so that nothing read from it can run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from dpo_ray import storage
from dpo_ray.errors import CheckpointError, DpoRayError
from dpo_ray.training.checkpoint_tensors import MODEL, OPTIMIZER, REFERENCE
from dpo_ray.training.manifest import (
    FORMAT_VERSION,
    FileRecord,
    Manifest,
    attempt_folder,
    checkpoint_name,
    checkpoint_uri,
    commit,
    read_manifest,
)
from dpo_ray.types import TrainState

_LAYOUT = "layout.json"
_FILES = {MODEL: "rank", OPTIMIZER: "optimizer", REFERENCE: "reference"}
_DTYPES = {  # As safetensors names them.
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PIECE_BYTES = 2**20  # Hashed and written while it is in the CPU's cache.

P = ParamSpec("P")
T = TypeVar("T")


class Listener(Protocol):
    """Who hears of checkpoints, on rank 0 and in the background."""

    def promise(self, state: TrainState) -> None:
        """Right before one is committed; when it raises, nothing is, and its error is that of the save."""

    def committed(self, line: dict[str, Any]) -> None:
        """When one has been, with its step as `checkpoint`."""

    def needs(self, step: int) -> bool:
        """Whether the checkpoint of a step must be kept, however old."""


class DamagedError(CheckpointError):
    """What is on storage is not what was written: the checkpoint must be set aside.

    Attributes:
        file: Below the checkpoint, where it is not what the manifest says.
    """

    file: str | None = None

    @classmethod
    def of(cls, place: str, file: str, problem: str) -> DamagedError:
        error = cls(f"{storage.join(place, file)}: {problem}")
        error.file = file
        return error


def cause_of(error: BaseException) -> DpoRayError:
    """One error for people out of what DCP gathered from all ranks; the same on each."""
    if isinstance(error, CheckpointException):
        causes = [cause_of(failure) for _, (failure, _) in sorted(error.failures.items())]
        return next((cause for cause in causes if isinstance(cause, DamagedError)), causes[0])
    if isinstance(error, DpoRayError):
        return error
    return CheckpointError(f"{type(error).__name__}: {error}")


def _picklable(work: Callable[P, T]) -> Callable[P, T]:
    """Lets only errors out that DCP can send to the other ranks; they would wait for ever for another."""

    @wraps(work)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return work(*args, **kwargs)
        except Exception as error:
            raise cause_of(error) from error

    return wrapped


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Where a part of a tensor is: under which key of which file, and what that file is."""

    file: str
    key: str
    record: FileRecord


class Writer(StorageWriter):
    """Writes the files of each rank; the coordinator adds the layout, and commits."""

    def __init__(self, run_uri: str, state: TrainState, attempt: int, listener: Listener | None) -> None:
        self._run_uri, self._state, self._attempt, self._listener = run_uri, state, attempt, listener
        self.folder = storage.join(checkpoint_uri(run_uri, checkpoint_name(state.step)), attempt_folder(attempt))
        self.committing = False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"{rank:04d}.safetensors") for rank, plan in enumerate(plans)]

    @_picklable
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        for prefix, kind in _FILES.items():
            tensors: dict[str, torch.Tensor] = {}
            keys: dict[MetadataIndex, str] = {}
            for item in (item for item in plan.items if item.index.fqn.startswith(prefix)):
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor), f"{item.index.fqn} is no tensor"
                keys[item.index] = f"{item.index.fqn}@{_text(item.index.offset)}"
                tensors[keys[item.index]] = tensor
            if tensors:
                name = f"{kind}-{plan.storage_data}"
                record = self._write(name, tensors)
                results += [WriteResult(i, tensors[key].nbytes, _Chunk(name, key, record)) for i, key in keys.items()]
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written

    def _write(self, name: str, tensors: dict[str, torch.Tensor]) -> FileRecord:
        place = storage.join(self.folder, name)
        try:
            if storage.is_local(place):
                return write_safetensors(storage.filesystem(place)[1], tensors)
            with storage.scratch("save") as local:
                path = os.path.join(local, name)
                record = write_safetensors(path, tensors)
                storage.upload(path, place)
                return record
        except OSError as error:
            raise CheckpointError(f"{place}: cannot be written: {error}") from error

    @_picklable
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks = {result.index: result.storage_data for rank_results in results for result in rank_results}
        layout = json.dumps(_layout(metadata, chunks)).encode()
        storage.write_bytes(storage.join(self.folder, _LAYOUT), layout)
        files = {chunk.file: chunk.record for chunk in chunks.values()}
        files[_LAYOUT] = FileRecord(len(layout), hashlib.sha256(layout).hexdigest())
        there = {storage.name_of(info.uri): info.num_bytes for info in storage.expand(self.folder)}
        for name, record in files.items():
            if there.get(name) != record.size:
                found = f"{there[name]} bytes" if name in there else "missing"
                raise CheckpointError(f"{storage.join(self.folder, name)}: {found}, {record.size} bytes were written")
        within = attempt_folder(self._attempt)
        files = {f"{within}/{name}": record for name, record in sorted(files.items())}
        manifest = Manifest(self._state, self._attempt, len(results), files)
        commit(self._run_uri, manifest, self._begin_commit)

    def _begin_commit(self) -> None:
        if self._listener is not None:
            self._listener.promise(self._state)
        self.committing = True


class Reader(StorageReader):
    """Reads what a rank needs out of files that it has verified."""

    def __init__(self, place: str, manifest: Manifest, layout: Metadata) -> None:
        self._place, self._manifest, self._layout = place, manifest, layout

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._layout

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @_picklable
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._layout.storage_data[item.storage_index][0], []).append(item)
        for file, items in sorted(by_file.items()):
            with storage.scratch("load") as local:
                path = verified(self._place, file, self._manifest, local)
                self._copy(path, file, items, planner)
        read: Future[None] = Future()
        read.set_result(None)
        return read

    def _copy(self, path: str, file: str, items: list[ReadItem], planner: LoadPlanner) -> None:
        try:
            with safe_open(path, framework="pt") as shard:
                for item in items:
                    saved = shard.get_tensor(self._layout.storage_data[item.storage_index][1])
                    ranges = zip(item.storage_offsets, item.lengths, strict=True)
                    part = saved[tuple(slice(start, start + length) for start, length in ranges)]
                    target = planner.resolve_tensor(item)
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        except (SafetensorError, OSError) as error:
            # What was written, as far as the digest goes: whoever reads it finds the same.
            raise DamagedError(f"{storage.join(self._place, file)}: damaged: {error}") from error


def write_safetensors(path: str, tensors: dict[str, torch.Tensor]) -> FileRecord:
    """Writes tensors of the CPU as a durable safetensors file, and takes its digest on the way.

    The library's own function would need a second pass over the file for the digest, and in older versions a second
    copy of all tensors in memory.

    Args:
        path: A local path; its folder is made.
        tensors: By key.
    """
    # Wide elements first, as the library does, so that each tensor is aligned to its elements.
    ordered = sorted(tensors.items(), key=lambda entry: (-entry[1].element_size(), entry[0]))
    header, end = {}, 0
    for key, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts: list[bytes | memoryview] = [len(text).to_bytes(8, "little") + text]
    parts += [_bytes(tensor) for _, tensor in ordered]
    digest = hashlib.sha256()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        for part in parts:
            for start in range(0, len(part), _PIECE_BYTES):
                piece = part[start : start + _PIECE_BYTES]
                digest.update(piece)
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        storage.sync_folder(path)
        return FileRecord(file.tell(), digest.hexdigest())


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _layout(metadata: Metadata, chunks: dict[MetadataIndex, _Chunk]) -> dict[str, Any]:
    tensors = {}
    for name, about in metadata.state_dict_metadata.items():
        assert isinstance(about, TensorStorageMetadata), f"{name} is no tensor"
        parts = []
        for part in about.chunks:
            chunk = chunks[MetadataIndex(name, part.offsets)]
            ranges = {"offsets": list(part.offsets), "sizes": list(part.sizes)}
            parts.append({**ranges, "file": chunk.file, "key": chunk.key})
        tensors[name] = {"dtype": _NAMES[about.properties.dtype], "size": list(about.size), "chunks": parts}
    return {"format": FORMAT_VERSION, "tensors": tensors}


def read_layout(run_uri: str, name: str) -> tuple[Manifest, Metadata]:
    """A checkpoint's manifest and, for DCP, where its tensors are."""
    place = checkpoint_uri(run_uri, name)
    try:
        manifest = read_manifest(run_uri, name)
    except (CheckpointError, FileNotFoundError) as error:
        raise DamagedError(str(error)) from error
    within = attempt_folder(manifest.attempt)
    with storage.scratch("load") as local:
        path = verified(place, f"{within}/{_LAYOUT}", manifest, local)
        with open(path, "rb") as file:
            raw = file.read()
    tensors: dict[str, Any] = {}
    stored: dict[MetadataIndex, tuple[str, str]] = {}
    try:
        for fqn, about in json.loads(raw)["tensors"].items():
            parts = []
            for part in about["chunks"]:
                parts.append(ChunkStorageMetadata(torch.Size(part["offsets"]), torch.Size(part["sizes"])))
                stored[MetadataIndex(fqn, parts[-1].offsets)] = f"{within}/{part['file']}", part["key"]
            properties = TensorProperties(_DTYPES[about["dtype"]])
            tensors[fqn] = TensorStorageMetadata(properties, torch.Size(about["size"]), parts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{storage.join(place, within, _LAYOUT)}: damaged: {error}") from error
    return manifest, Metadata(tensors, storage_data=stored)


def verified(place: str, file: str, manifest: Manifest, local: str) -> str:
    """A local path of a file that is what the manifest says.

    Args:
        place: The checkpoint.
        file: Below it.
        manifest: What the file must be.
        local: Where to put what is not on this machine.
    """
    uri = storage.join(place, file)
    if file not in manifest.files:
        raise DamagedError.of(place, file, "the manifest does not know it")
    record, problem = manifest.files[file], ""
    # What was damaged on its way, once, is no damaged file.
    for _ in range(2):
        try:
            if storage.is_local(uri):
                path = storage.filesystem(uri)[1]
            else:
                path = os.path.join(local, os.path.basename(file))
                storage.download(uri, path)
            size = os.stat(path).st_size
            if size == record.size and storage.sha256_of_file(path) == record.sha256:
                return path
        except FileNotFoundError:
            problem = "missing"
        else:
            found = f"{size} bytes instead of {record.size}" if size != record.size else "its SHA-256 differs"
            problem = f"damaged: {found}"
    raise DamagedError.of(place, file, problem)


def check_fit(place: str, layout: Metadata, tensors: dict[str, torch.Tensor]) -> None:
    saved = saved_sizes(layout)
    needed = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    for name in sorted(saved.keys() | needed.keys()):
        if saved.get(name) != needed.get(name):
            raise CheckpointError(
                f"{place} is of another model, adapter or optimizer: {name} is {saved.get(name)} there, "
                f"{needed.get(name)} here"
            )


def saved_sizes(layout: Metadata) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Size and dtype of a checkpoint's tensors."""
    return {
        name: (tuple(about.size), about.properties.dtype)
        for name, about in layout.state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata)
    }


def _text(offset: torch.Size | None) -> str:
    return ",".join(map(str, offset or ()))
