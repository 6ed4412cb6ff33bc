"""Faults planted into a run under test, by Python at the start of every process with this folder on PYTHONPATH.

DPO_RAY_FAULTS names a JSON file: `{"pace_s": seconds that each training step is slowed by, "faults": [...]}`, a fault
being `{"point": where, "do": what}`, with `"step"` and `"rank"` where the point has them. It happens once, whatever
starts again: a file beside the JSON file says that it has.

Points: `group` (before a rank joins the process group), `step` (before a training step), `backward` (in the middle of
its backward pass), `shard` (before a rank's part of a checkpoint is written), `uploaded` (after), `commit` (before the
manifest), `score` (a reference actor, before a chunk), `tokenize` (a task of `prepare`, after a block).
What: `raise`, `kill` (SIGKILL), `stop` (SIGSTOP), `skip` (the step, with its collectives), `slow` (half a minute),
`full` (no space left), `memory` (the device has none left).
"""

from __future__ import annotations

import errno
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

PLACE = os.environ.get("DPO_RAY_FAULTS", "")


def spec() -> dict[str, Any]:
    """What shall happen; read when it is asked for, since a cluster's processes may be older."""
    try:
        with open(PLACE) as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return {}


class Planted(Exception):
    """A fault of a test."""


class Skip(Exception):
    """The step shall not be done."""


def happen(point: str, step: int | None = None, rank: int | None = None) -> None:
    """Lets a fault of this point happen, if there is one that has not happened yet."""
    for index, fault in enumerate(spec().get("faults", [])):
        if fault["point"] != point or fault.get("step", step) != step or fault.get("rank", rank) != rank:
            continue
        try:
            os.close(os.open(f"{PLACE}.{index}.happened", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        do(fault["do"], f"{point} {step} {rank}")
        return  # The next one has its own time.


def do(what: str, where: str) -> None:
    """The fault itself."""
    if what == "raise":
        raise Planted(f"planted at {where}")
    if what == "full":
        raise OSError(errno.ENOSPC, f"no space left on device, planted at {where}")
    if what == "memory":
        import torch

        raise torch.OutOfMemoryError(f"planted at {where}")
    if what == "skip":
        raise Skip
    if what == "slow":
        time.sleep(30)
        return
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])


def my_rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def in_loop(module: ModuleType) -> None:
    train_step = module.train_step

    def paced(model: Any, optimizer: Any, batch: Any, *arguments: Any) -> Any:
        time.sleep(spec().get("pace_s", 0.0))
        try:
            happen("step", batch.step, my_rank())
        except Skip:
            time.sleep(3600)
        module_of_step = sys.modules["dpo_ray.training.step"]
        module_of_step.step_now = batch.step
        return train_step(model, optimizer, batch, *arguments)

    module.train_step = paced


def in_step(module: ModuleType) -> None:
    answer_scores = module.answer_scores

    def hooked(*arguments: Any) -> Any:
        scores = answer_scores(*arguments)
        if scores.logps.requires_grad:
            scores.logps.register_hook(lambda gradient: happen("backward", module.step_now, my_rank()))
        return scores

    module.answer_scores = hooked


def in_manifest(module: ModuleType) -> None:
    commit = module.commit

    def planted(run_uri: str, manifest: Any, *arguments: Any) -> Any:
        happen("commit", manifest.state.step, 0)
        return commit(run_uri, manifest, *arguments)

    module.commit = planted


def in_checkpoint(module: ModuleType) -> None:
    write = module.Writer._write

    def planted(self: Any, name: str, *arguments: Any) -> Any:
        rank = int(name.partition("-")[2][:4])
        happen("shard", self._state.step, rank)
        record = write(self, name, *arguments)
        happen("uploaded", self._state.step, rank)
        return record

    module.Writer._write = planted
    in_manifest(module)


def in_replicas(module: ModuleType) -> None:
    score = module.ReferenceReplica.score

    def planted(self: Any, chunk: Any) -> Any:
        happen("score")
        return score(self, chunk)

    module.ReferenceReplica.score = planted


def in_rows(module: ModuleType) -> None:
    make_runs = module._make_runs

    def planted(*arguments: Any) -> Any:
        record = make_runs(*arguments)
        happen("tokenize")
        return record

    module._make_runs = planted


def in_torch_config(module: ModuleType) -> None:
    set_up = module._setup_torch_process_group

    def planted(*arguments: Any, **named: Any) -> Any:
        happen("group")
        return set_up(*arguments, **named)

    module._setup_torch_process_group = planted


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "dpo_ray.training.loop": in_loop,
    "dpo_ray.training.step": in_step,
    "dpo_ray.training.checkpoint_files": in_checkpoint,
    "dpo_ray.orchestration.replicas": in_replicas,
    "dpo_ray.orchestration.rows": in_rows,
    "ray.train.torch.config": in_torch_config,
}


class Planter(importlib.abc.MetaPathFinder):
    """Patches a module right after its import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_and_patch(module: ModuleType) -> None:
            execute(module)
            PATCHES[name](module)

        spec.loader.exec_module = exec_and_patch  # type: ignore[method-assign]
        return spec


if PLACE:
    sys.meta_path.insert(0, Planter())
