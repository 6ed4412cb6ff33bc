"""Attempts: which checkpoint one begins with, and that only the newest may write."""

from pathlib import Path

import pytest

from dpo_ray import storage
from dpo_ray.errors import FencedError, FinalError
from dpo_ray.training import attempts, manifest
from dpo_ray.training.attempts import Fence
from dpo_ray.training.manifest import Manifest
from dpo_ray.types import TrainState


def commit(run: str, step: int, attempt: int) -> None:
    """A checkpoint without tensors."""
    manifest.commit(run, Manifest(TrainState(step), attempt, 1, {}), lambda: None)


def test_positions_and_the_fence(tmp_path: Path) -> None:
    run = str(tmp_path)
    first = attempts.begin(run, 1, 2, "start")
    assert (first.attempt, first.position, first.checkpoint, first.world_size) == (0, 0, None, 2)
    Fence(run, first).check()
    commit(run, 4, 0)
    second = attempts.begin(run, 1, 1, "a node died")
    assert (second.attempt, second.position, second.checkpoint) == (1, 4, "step-00000004")
    assert attempts.read_attempts(run) == [first, second]
    Fence(run, second).check()
    with pytest.raises(FencedError, match="attempt 0 of .* writes no more: attempt 1 has begun"):
        Fence(run, first).check()


def test_a_driver_that_lost_the_run_cannot_take_it_back(tmp_path: Path) -> None:
    """Its record may come last, with the number that the new driver's has: the lease's generation decides."""
    run = str(tmp_path)
    old = attempts.begin(run, 1, 1, "start")
    new = attempts.begin(run, 2, 1, "continue")
    late = attempts.begin(run, 1, 1, "a worker died")
    Fence(run, new).check()
    for refused in (old, late):
        with pytest.raises(FencedError):
            Fence(run, refused).check()


def test_no_run_begins_anew_by_itself(tmp_path: Path) -> None:
    """Two attempts read step 4 wrongly, and set it aside: step 1 comes again when somebody says so."""
    run = str(tmp_path)
    attempts.begin(run, 1, 1, "start")
    assert attempts.begin(run, 1, 1, "a worker died").position == 0  # Before the first checkpoint.
    commit(run, 4, 1)
    attempts.begin(run, 1, 1, "a worker died")
    manifest.set_aside(run, "step-00000004", "rank-0000: its SHA-256 differs")
    message = "went on from step 4, and no checkpoint is left to go on from:\n  step-00000004: rank-0000: its SHA-256"
    with pytest.raises(FinalError, match=message):
        attempts.begin(run, 1, 1, "a worker died")
    assert len(attempts.read_attempts(run)) == 3


def test_a_checkpoint_that_came_too_late_is_not_used(tmp_path: Path) -> None:
    """Attempt 0 commits step 8 after attempt 1 has begun at step 4 and recorded other lines from there on."""
    run = str(tmp_path)
    attempts.begin(run, 1, 1, "start")
    commit(run, 4, 0)
    attempts.begin(run, 1, 1, "cut off")
    commit(run, 8, 0)
    third = attempts.begin(run, 1, 1, "a worker died")
    assert (third.position, third.checkpoint) == (4, "step-00000004")
    aside = storage.read_json(str(tmp_path / "checkpoints" / "step-00000008" / "set-aside-0000.json"))
    assert aside["reason"] == "attempt 0 committed it after attempt 1 had begun before it"
    commit(run, 8, 2)
    assert attempts.begin(run, 1, 1, "a worker died").position == 8
