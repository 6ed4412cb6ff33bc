"""Checkpoints: sharded by DCP, written in the background, committed by a manifest, verified before anything is read.

What a rank has of weights and optimizer is copied into buffers of the CPU, and training goes on; a thread then writes
the copy, safetensors files of the rank's own, with a digest taken on the way. Where groups of ranks have copies of the
weights each, every group writes another part of them. `layout.json` says where each part of each tensor is. The
manifest, which rank 0 writes last, makes it a checkpoint. Nothing here is pickled to storage, so that nothing read from
it can run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from threading import Thread
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.optim import Optimizer

from dpo_ray import storage
from dpo_ray.errors import CheckpointError, DpoRayError, StorageError
from dpo_ray.model.shard import alone, local_part
from dpo_ray.storage_requests import full_patience_s
from dpo_ray.training.attempts import read_attempts
from dpo_ray.training.checkpoint_files import (
    DamagedError,
    Listener,
    Reader,
    Writer,
    cause_of,
    check_fit,
    read_layout,
    saved_sizes,
    verified,
)
from dpo_ray.training.checkpoint_tensors import (
    MODEL,
    REFERENCE,
    make_state,
    of_this_copy,
    parameters_of,
    tensors_of,
    tensors_of_model,
)
from dpo_ray.training.manifest import Manifest, checkpoint_uri, prune, read_manifest, set_aside, take_best
from dpo_ray.types import TrainState

log = logging.getLogger(__name__)
# Beyond the patience with the storage, for the work itself.
GROUP_MARGIN_S = 1800.0

T = TypeVar("T")


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
                raise cause_of(self._writing.error) from self._writing.error
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
            cause = cause_of(error)
            if isinstance(cause, DamagedError):
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
            tensors = of_this_copy(tensors_of(self._model, self._optimizer) | self._reference)
            for name in tensors.keys() - self._buffers.keys():
                tensor = tensors[name]
                self._buffers[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            targets = [local_part(self._buffers[name]) for name in tensors]
            # Many small tensors cost more by their number than by their size: all in one call.
            torch._foreach_copy_(targets, [local_part(tensor) for tensor in tensors.values()], non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return self._buffers

    def _write(self, staged: dict[str, torch.Tensor], state: TrainState) -> None:
        writer = Writer(self._run_uri, state, self._attempt, self._listener)
        try:
            # What all ranks have stands in one rank's file: at loading each reads that one and its own, not all.
            planner = DefaultSavePlanner(
                flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
            )
            dcp.save(dict(staged), storage_writer=writer, planner=planner, process_group=self._group, no_dist=alone())
        except BaseException as error:  # DCP's CheckpointException is no Exception.
            # A manifest whose writing failed may still have come to be. And storage that fails is not asked again.
            if self._rank == 0 and not writer.committing and not isinstance(cause_of(error), StorageError):
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
        manifest, layout = self._from_rank_0(partial(read_layout, self._run_uri, name))
        place = checkpoint_uri(self._run_uri, name)
        if not self._optimizer.state:
            make_state(self._optimizer)
        tensors = tensors_of(self._model, self._optimizer) | self._reference
        tensors = {key: tensor.detach() for key, tensor in tensors.items()}
        check_fit(place, layout, tensors)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        reader = Reader(place, manifest, layout)
        dcp.load(tensors, storage_reader=reader, planner=planner, process_group=self._group, no_dist=alone())
        return manifest

    def _from_rank_0(self, work: Callable[[], T]) -> T:
        """What `work` gives, or raises, on rank 0."""
        answer: list[Any] = [None]
        if self._rank == 0:
            try:
                answer = [work()]
            except Exception as error:
                answer = [cause_of(error)]
        dist.broadcast_object_list(answer, src=0, group=self._group)
        if isinstance(answer[0], DpoRayError):
            raise answer[0]
        found: T = answer[0]
        return found


def _set_aside_if_damaged(run_uri: str, name: str, error: DamagedError) -> None:
    """Sets a checkpoint aside, unless the file that another rank could not use is sound when this one reads it."""
    if error.file is not None:
        with suppress(DamagedError, FileNotFoundError), storage.scratch("load") as local:
            verified(checkpoint_uri(run_uri, name), error.file, read_manifest(run_uri, name), local)
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


def read_reference(run_uri: str, name: str, model: nn.Module) -> None:
    """Gives a model the weights of the moving reference in a checkpoint; each rank of a sharded one reads its part.

    Raises:
        CheckpointError: A file is missing or damaged, or of another model.
    """
    wanted = {f"{REFERENCE}{key}": tensor for key, tensor in parameters_of(model).items()}
    try:
        _read_part(run_uri, name, REFERENCE, wanted)
    except (Exception, CheckpointException) as error:
        raise cause_of(error) from error


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
        return _read_part(run_uri, name, MODEL, tensors_of_model(model)).state
    except (Exception, CheckpointException) as error:
        cause = cause_of(error)
        if isinstance(cause, DamagedError):
            # A later attempt may just have put another in its place.
            with suppress(CheckpointError, FileNotFoundError):
                if read_manifest(run_uri, name).attempt == attempt:
                    set_aside(run_uri, name, str(cause))
        raise cause from error


def _read_part(run_uri: str, name: str, prefix: str, wanted: Mapping[str, torch.Tensor]) -> Manifest:
    """Reads the tensors of a checkpoint whose names have a prefix; they are all of `wanted`."""
    manifest, layout = read_layout(run_uri, name)
    there = {key: size for key, (size, _) in saved_sizes(layout).items() if key.startswith(prefix)}
    if there != {key: tuple(tensor.shape) for key, tensor in wanted.items()}:
        raise CheckpointError(f"{checkpoint_uri(run_uri, name)}: its {prefix[:-1]} is of another model")
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = Reader(checkpoint_uri(run_uri, name), manifest, layout)
    dcp.load(
        {key: tensor.detach() for key, tensor in wanted.items()}, storage_reader=reader, planner=planner, no_dist=True
    )
    return manifest


def patient_group() -> dist.ProcessGroup:
    """A process group of all ranks on the CPU, in which one that waits out an outage is not given up by the others.

    Collective: all ranks.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=full_patience_s() + GROUP_MARGIN_S))
