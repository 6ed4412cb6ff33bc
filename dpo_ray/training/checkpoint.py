"""Checkpoints: sharded by DCP, written in the background, committed by a manifest, verified before anything is read.

What a rank has of weights and optimizer is copied into buffers of the CPU, and training goes on; a thread then writes
the copy, safetensors files of the rank's own, with a digest taken on the way. Where groups of ranks have copies of the
weights each, every group writes another part of them. `layout.json` says where each part of each tensor is. The
manifest, which rank 0 writes last, makes it a checkpoint. Nothing here is pickled to storage, so that nothing read from
it can run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial, wraps
from threading import Thread
from types import TracebackType
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.optim import Optimizer

from dpo_ray import storage
from dpo_ray.errors import CheckpointError, DpoRayError, StorageError
from dpo_ray.model.adapter import is_adapters
from dpo_ray.model.shard import alone
from dpo_ray.storage_requests import full_patience_s
from dpo_ray.training.attempts import read_attempts
from dpo_ray.training.manifest import (
    FORMAT_VERSION,
    FileRecord,
    Manifest,
    attempt_folder,
    checkpoint_name,
    checkpoint_uri,
    commit,
    prune,
    read_manifest,
    set_aside,
    take_best,
)
from dpo_ray.types import TrainState

log = logging.getLogger(__name__)
_LAYOUT = "layout.json"
# Of the names of tensors. What others read who want nothing else, the policy or a moving reference, is in files of its
# own: the optimizer's state is twice the policy's weights.
REFERENCE, _MODEL, _OPTIMIZER = "reference.", "model.", "optimizer."
_FILES = {_MODEL: "rank", _OPTIMIZER: "optimizer", REFERENCE: "reference"}
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
# Beyond the patience with the storage, for the work itself.
GROUP_MARGIN_S = 1800.0
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


class Checkpointer:
    """Saves and restores this rank's part of a model and its optimizer.

    A context manager: leaving it waits for the save in flight, unless an error is under way, when peers may be dead.
    """

    def __init__(
        self,
        run_uri: str,
        model: nn.Module,
        optimizer: Optimizer,
        attempt: int,
        keep: int,
        keep_best: str | None = None,
        reference: Mapping[str, torch.Tensor] | None = None,
        listener: Listener | None = None,
    ) -> None:
        """Makes a process group for the traffic of checkpoints.

        Args:
            run_uri: The run.
            model: With DTensors for parameters.
            optimizer: Of these parameters.
            attempt: Names what is written.
            keep: Newest checkpoints kept.
            keep_best: The metric whose best step's checkpoint is kept too.
            reference: This rank's part of a reference that moves, by the names of the policy's parameters.
            listener: Who hears of checkpoints, on rank 0.

        Collective: all ranks.
        """
        self._run_uri, self._model, self._optimizer = run_uri, model, optimizer
        self._reference = {f"{REFERENCE}{name}": tensor for name, tensor in (reference or {}).items()}
        self._attempt, self._keep, self._keep_best = attempt, keep, keep_best
        self._listener = listener
        # Its own: a save must not meet the train step's collectives. And of the CPU, where the copies are.
        self._group = patient_group()
        self._rank = dist.get_rank()
        self._buffers: dict[str, torch.Tensor] = {}
        self._writing: _Background | None = None
        self._stored_step: int | None = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
            dist.destroy_process_group(self._group)

    def take_best(self, state: TrainState, line: dict[str, Any]) -> bool:
        """Whether an evaluation is the best so far, and its step's checkpoint to be kept; the state then says so."""
        return self._keep_best is not None and take_best(self._keep_best, line, state)

    def save(self, state: TrainState, wait: bool = False) -> None:
        """Copies what there is now, and has it written and committed in the background.

        Waits for the save before, and if asked to for this one. A step that this attempt has saved, or begun with, is
        not saved again.

        Raises:
            DpoRayError: The save before has failed.

        Collective: all ranks.
        """
        self.wait()
        if state.step == self._stored_step:
            return
        self._stored_step = state.step
        self._writing = _Background(partial(self._write, self._staged(), replace(state)))
        self._writing.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when the save in flight is committed.

        Raises:
            DpoRayError: It has failed, on whichever rank; the same on all ranks.
        """
        if self._writing is not None:
            self._writing.join()
            if self._writing.error is not None:
                raise _cause(self._writing.error) from self._writing.error
            self._writing = None

    def load(self, name: str) -> TrainState:
        """Restores model and optimizer, at any world size.

        Raises:
            CheckpointError: A file is missing or damaged, and the checkpoint has been set aside, so that the next
                attempt starts from the one before; or it does not fit the model. The same on all ranks.

        Collective: all ranks.
        """
        try:
            manifest = self._read(name)
        except (Exception, CheckpointException) as error:
            cause = _cause(error)
            if isinstance(cause, _DamagedError):
                try:
                    if self._rank == 0:
                        _set_aside_if_damaged(self._run_uri, name, cause)
                finally:
                    # The first rank to leave ends the others, rank 0 too.
                    dist.barrier(self._group)
            raise cause from error
        self._stored_step = manifest.state.step
        return manifest.state

    def _staged(self) -> dict[str, torch.Tensor]:
        """A copy of what this rank writes, in buffers that are used again at the next save."""
        with torch.no_grad():
            tensors = _of_this_copy(tensors_of(self._model, self._optimizer) | self._reference)
            for name in tensors.keys() - self._buffers.keys():
                tensor = tensors[name]
                self._buffers[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            targets = [_local(self._buffers[name]) for name in tensors]
            # Many small tensors cost more by their number than by their size: all in one call.
            torch._foreach_copy_(targets, [_local(tensor) for tensor in tensors.values()], non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return self._buffers

    def _write(self, staged: dict[str, torch.Tensor], state: TrainState) -> None:
        writer = _Writer(self._run_uri, state, self._attempt, self._listener)
        try:
            # What all ranks have stands in one rank's file: at loading each reads that one and its own, not all.
            planner = DefaultSavePlanner(
                flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
            )
            dcp.save(dict(staged), storage_writer=writer, planner=planner, process_group=self._group, no_dist=alone())
        except BaseException as error:  # DCP's CheckpointException is no Exception.
            # A manifest whose writing failed may still have come to be. And storage that fails is not asked again.
            if self._rank == 0 and not writer.committing and not isinstance(_cause(error), StorageError):
                with suppress(DpoRayError, OSError):
                    storage.remove(writer.folder)
            raise
        if self._rank == 0:
            if self._listener is not None:
                self._listener.committed({"checkpoint": state.step})
            log.info("the checkpoint of step %d is committed", state.step)
            best = state.best_step if self._keep_best and self._keep_best == state.best_metric else None
            try:
                newest = read_attempts(self._run_uri)[-1:]
                # An attempt that has begun meanwhile loads it.
                spared = {each.checkpoint for each in newest if each.attempt != self._attempt}
                needed = self._listener.needs if self._listener is not None else lambda step: False
                prune(self._run_uri, self._keep, self._attempt, best, spared, needed)
            except (DpoRayError, OSError) as error:  # The checkpoint is there: old ones are nothing to fail for.
                log.warning("old checkpoints were not removed: %s", error)

    def _read(self, name: str) -> Manifest:
        manifest, layout = self._from_rank_0(partial(_read_layout, self._run_uri, name))
        place = checkpoint_uri(self._run_uri, name)
        if not self._optimizer.state:
            _make_state(self._optimizer)
        tensors = tensors_of(self._model, self._optimizer) | self._reference
        tensors = {key: tensor.detach() for key, tensor in tensors.items()}
        _check_fit(place, layout, tensors)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        reader = _Reader(place, manifest, layout)
        dcp.load(tensors, storage_reader=reader, planner=planner, process_group=self._group, no_dist=alone())
        return manifest

    def _from_rank_0(self, work: Callable[[], T]) -> T:
        """What `work` gives, or raises, on rank 0."""
        answer: list[Any] = [None]
        if self._rank == 0:
            try:
                answer = [work()]
            except Exception as error:
                answer = [_cause(error)]
        dist.broadcast_object_list(answer, src=0, group=self._group)
        if isinstance(answer[0], DpoRayError):
            raise answer[0]
        found: T = answer[0]
        return found


class _DamagedError(CheckpointError):
    """What is on storage is not what was written: the checkpoint must be set aside.

    Attributes:
        file: Below the checkpoint, where it is not what the manifest says.
    """

    file: str | None = None

    @classmethod
    def of(cls, place: str, file: str, problem: str) -> _DamagedError:
        error = cls(f"{storage.join(place, file)}: {problem}")
        error.file = file
        return error


def _set_aside_if_damaged(run_uri: str, name: str, error: _DamagedError) -> None:
    """Sets a checkpoint aside, unless the file that another rank could not use is sound when this one reads it."""
    if error.file is not None:
        with suppress(_DamagedError, FileNotFoundError), storage.scratch("load") as local:
            _verified(checkpoint_uri(run_uri, name), error.file, read_manifest(run_uri, name), local)
            log.error("%s; but rank 0 reads it well: memory or disk of that rank's host may be faulty", error)
            return
    set_aside(run_uri, name, str(error))


class _Background(Thread):
    """A thread that keeps its error. It does not hold up the end of a process: its peers may be dead."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._work = work
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error


def _cause(error: BaseException) -> DpoRayError:
    """One error for people out of what DCP gathered from all ranks; the same on each."""
    if isinstance(error, CheckpointException):
        causes = [_cause(failure) for _, (failure, _) in sorted(error.failures.items())]
        return next((cause for cause in causes if isinstance(cause, _DamagedError)), causes[0])
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
            raise _cause(error) from error

    return wrapped


def read_reference(run_uri: str, name: str, model: nn.Module) -> None:
    """Gives a model the weights of the moving reference in a checkpoint; each rank of a sharded one reads its part.

    Raises:
        CheckpointError: A file is missing or damaged, or of another model.
    """
    wanted = {f"{REFERENCE}{key}": tensor for key, tensor in parameters_of(model).items()}
    try:
        _read_part(run_uri, name, REFERENCE, wanted)
    except (Exception, CheckpointException) as error:
        raise _cause(error) from error


def read_policy(run_uri: str, name: str, attempt: int, model: nn.Module) -> TrainState:
    """Gives a model the policy's weights in a checkpoint, without the optimizer; each rank reads its part.

    Args:
        run_uri: The run.
        name: The checkpoint.
        attempt: Who wrote it.
        model: As `sharded_policy` makes it.

    Raises:
        CheckpointError: It is not there any more, or is of another model; or a file is missing or damaged, and it has
            been set aside.
    """
    try:
        return _read_part(run_uri, name, _MODEL, _tensors_of_model(model)).state
    except (Exception, CheckpointException) as error:
        cause = _cause(error)
        if isinstance(cause, _DamagedError):
            # A later attempt may just have put another in its place.
            with suppress(CheckpointError, FileNotFoundError):
                if read_manifest(run_uri, name).attempt == attempt:
                    set_aside(run_uri, name, str(cause))
        raise cause from error


def _read_part(run_uri: str, name: str, prefix: str, wanted: Mapping[str, torch.Tensor]) -> Manifest:
    """Reads the tensors of a checkpoint whose names have a prefix; they are all of `wanted`."""
    manifest, layout = _read_layout(run_uri, name)
    there = {key: size for key, (size, _) in _saved(layout).items() if key.startswith(prefix)}
    if there != {key: tuple(tensor.shape) for key, tensor in wanted.items()}:
        raise CheckpointError(f"{checkpoint_uri(run_uri, name)}: its {prefix[:-1]} is of another model")
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = _Reader(checkpoint_uri(run_uri, name), manifest, layout)
    dcp.load(
        {key: tensor.detach() for key, tensor in wanted.items()}, storage_reader=reader, planner=planner, no_dist=True
    )
    return manifest


def patient_group() -> dist.ProcessGroup:
    """A process group of all ranks on the CPU, in which one that waits out an outage is not given up by the others.

    Collective: all ranks.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=full_patience_s() + GROUP_MARGIN_S))


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's parameters by name, each once."""
    return {name: tensor for tensor, name in _names_of(model).items() if isinstance(tensor, nn.Parameter)}


def _names_of(model: nn.Module) -> dict[torch.Tensor, str]:
    """What is in a model's state; a tied weight once.

    FSDP2 takes the call as the sign to put its sharded parameters in place.
    """
    names: dict[torch.Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, name)
    return names


def tensors_of(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor that training changes, by a name that does not depend on the world size.

    Raises:
        CheckpointError: The optimizer has state that is no tensor: a checkpoint would lose it.
    """
    tensors: dict[str, Any] = dict(_tensors_of_model(model))
    names = {tensor: name.removeprefix(_MODEL) for name, tensor in tensors.items()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"{_OPTIMIZER}{names[parameter]}.{key}": value for key, value in state.items()}
    for index, group in enumerate(optimizer.param_groups):
        # All else of a group is the configuration's: a hyperparameter, or the learning rate of the next step.
        state = {key: value for key, value in group.items() if key != "params" and key not in optimizer.defaults}
        tensors |= {f"{_OPTIMIZER}group-{index}.{key}": value for key, value in state.items()}
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{name} is no tensor but {value!r}: checkpoints do not hold such optimizer state")
    return tensors


def _tensors_of_model(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those that training changes, but for the optimizer's."""
    names = _names_of(model)
    if any(map(is_adapters, names.values())):
        # Not what else is in the state: quantized weights have their scales there.
        kept = {one for one in model.parameters() if one.requires_grad} | set(model.buffers())
        names = {one: name for one, name in names.items() if one in kept}
    return {f"{_MODEL}{name}": tensor for tensor, name in names.items()}


def _of_this_copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of tensors that groups of ranks have a copy of each, those that this rank's group writes: all write as much."""
    written: dict[int, int] = {}
    own = {}
    # In the order in which all ranks see them, whatever they are.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        if isinstance(tensor, DTensor) and tensor.device_mesh.ndim > 1:
            copies = range(tensor.device_mesh.size(0))
            writer = min(copies, key=lambda copy: written.get(copy, 0))
            written[writer] = written.get(writer, 0) + tensor.nbytes
            if writer != tensor.device_mesh.get_local_rank(0):
                continue
        own[name] = tensor
    return own


def _make_state(optimizer: Optimizer) -> None:
    """Makes an optimizer's tensors by a step without gradient; what they hold is about to be replaced."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Where a part of a tensor is: under which key of which file, and what that file is."""

    file: str
    key: str
    record: FileRecord


class _Writer(StorageWriter):
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


class _Reader(StorageReader):
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
                path = _verified(self._place, file, self._manifest, local)
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
            raise _DamagedError(f"{storage.join(self._place, file)}: damaged: {error}") from error


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


def _read_layout(run_uri: str, name: str) -> tuple[Manifest, Metadata]:
    """A checkpoint's manifest and, for DCP, where its tensors are."""
    place = checkpoint_uri(run_uri, name)
    try:
        manifest = read_manifest(run_uri, name)
    except (CheckpointError, FileNotFoundError) as error:
        raise _DamagedError(str(error)) from error
    within = attempt_folder(manifest.attempt)
    with storage.scratch("load") as local:
        path = _verified(place, f"{within}/{_LAYOUT}", manifest, local)
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
        raise _DamagedError(f"{storage.join(place, within, _LAYOUT)}: damaged: {error}") from error
    return manifest, Metadata(tensors, storage_data=stored)


def _verified(place: str, file: str, manifest: Manifest, local: str) -> str:
    """A local path of a file that is what the manifest says.

    Args:
        place: The checkpoint.
        file: Below it.
        manifest: What the file must be.
        local: Where to put what is not on this machine.
    """
    uri = storage.join(place, file)
    if file not in manifest.files:
        raise _DamagedError.of(place, file, "the manifest does not know it")
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
    raise _DamagedError.of(place, file, problem)


def _check_fit(place: str, layout: Metadata, tensors: dict[str, torch.Tensor]) -> None:
    saved = _saved(layout)
    needed = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    for name in sorted(saved.keys() | needed.keys()):
        if saved.get(name) != needed.get(name):
            raise CheckpointError(
                f"{place} is of another model, adapter or optimizer: {name} is {saved.get(name)} there, "
                f"{needed.get(name)} here"
            )


def _saved(layout: Metadata) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Size and dtype of a checkpoint's tensors."""
    return {
        name: (tuple(about.size), about.properties.dtype)
        for name, about in layout.state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata)
    }


def _text(offset: torch.Size | None) -> str:
    return ",".join(map(str, offset or ()))
