"""Checkpoints: sharded by DCP, committed by a manifest that is written last, verified before anything is read.

A checkpoint exists when its `manifest.json` does. The manifest has the run's state and the size and SHA-256 of every
file; each rank verifies the files that it reads, and a checkpoint that fails is set aside.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.futures import Future
from torch.optim import Optimizer

from dpo_ray import storage
from dpo_ray.errors import CheckpointError
from dpo_ray.training.manifest import FORMAT_VERSION, checkpoint_name, prune, read_manifest, set_aside
from dpo_ray.types import TrainState


def save(run_uri: str, model: nn.Module, optimizer: Optimizer, state: TrainState, attempt: int, keep: int) -> str:
    """Writes and commits a checkpoint, then removes those beyond the newest `keep`.

    Each rank uploads its own shards under names that no other attempt uses; the manifest makes them a checkpoint.

    Returns:
        Its name.

    Collective: all ranks.
    """
    name = checkpoint_name(state.step)
    folder = storage.join(run_uri, "checkpoints", name)
    weights, moments = get_state_dict(model, optimizer)
    with tempfile.TemporaryDirectory(prefix="dpo_ray-save-") as local:
        # thread_count 1: with helper threads DCP commits although one of them has failed (pytorch#191391).
        writer = FileSystemWriter(local, single_file_per_rank=True, thread_count=1)
        dcp.save({"model": weights, "optimizer": moments}, storage_writer=writer)
        files = {}
        for path in sorted(Path(local).iterdir()):
            stored = f"attempt-{attempt:04d}-{path.name.lstrip('._')}"
            storage.upload(str(path), storage.join(folder, stored))
            files[path.name] = {
                "object": stored,
                "size": path.stat().st_size,
                "sha256": storage.sha256_of_file(str(path)),
            }
    everyones: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyones, files)
    if dist.get_rank() == 0:
        manifest = {
            "format": FORMAT_VERSION,
            "state": asdict(state),
            "attempt": attempt,
            "world_size": dist.get_world_size(),
            "files": {file: about for rank_files in everyones for file, about in rank_files.items()},
        }
        storage.write_json(storage.join(folder, "manifest.json"), manifest)
        prune(run_uri, keep)
    dist.barrier()
    return name


def load(run_uri: str, name: str, model: nn.Module, optimizer: Optimizer) -> TrainState:
    """Restores model and optimizer, at any world size.

    Raises:
        CheckpointError: A file is missing or damaged; the checkpoint has been set aside, so that the next attempt
            starts from the one before.

    Collective: all ranks.
    """
    manifest = read_manifest(run_uri, name)
    weights, moments = get_state_dict(model, optimizer)
    with tempfile.TemporaryDirectory(prefix="dpo_ray-load-") as local:
        reader = _VerifiedReader(local, storage.join(run_uri, "checkpoints", name), manifest["files"])
        try:
            dcp.load({"model": weights, "optimizer": moments}, storage_reader=reader)
        except BaseException as error:  # DCP's CheckpointException is no Exception.
            if reader.problem is None:
                raise
            set_aside(run_uri, name, str(reader.problem))
            raise CheckpointError(str(reader.problem)) from error
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return TrainState(**manifest["state"])


class _VerifiedReader(FileSystemReader):
    """Fetches each file that this rank reads, and checks it against the manifest before it is opened."""

    def __init__(self, local: str, uri: str, files: dict[str, dict[str, Any]]) -> None:
        super().__init__(local)
        self._local, self._uri, self._files = local, uri, files
        self.problem: CheckpointError | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._fetch(".metadata")
        return super().read_metadata(*args, **kwargs)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for name in sorted({self.storage_data[item.storage_index].relative_path for item in plan.items}):
            self._fetch(name)
        return super().read_data(plan, planner)

    def _fetch(self, name: str) -> None:
        path = os.path.join(self._local, name)
        if os.path.exists(path):
            return
        about = self._files.get(name, {"object": name, "sha256": "none"})
        place = storage.join(self._uri, about["object"])
        try:
            storage.download(place, path)
        except FileNotFoundError:
            self.problem = CheckpointError(f"{place}: missing; the checkpoint is set aside")
            raise self.problem from None
        if storage.sha256_of_file(path) != about["sha256"]:
            self.problem = CheckpointError(f"{place}: damaged (SHA-256 differs); the checkpoint is set aside")
            raise self.problem
