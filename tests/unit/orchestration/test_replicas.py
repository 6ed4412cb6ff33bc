"""When replicas are lost too often."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.errors import DataError, EvaluationError
from dpo_ray.orchestration import replicas
from dpo_ray.orchestration.evaluator import _Checkpoint
from dpo_ray.orchestration.replicas import Losses, Lost
from dpo_ray.training.evaluations import Made
from dpo_ray.training.faults import read_faults


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Losses:
    """Two are survived, each of which counts."""
    monkeypatch.setattr(replicas, "LOST_PAUSE_S", -1.0)
    return Losses(2, EvaluationError, "evaluation")


def lost(step: int | None = None, reason: str = "its process died", **about: Any) -> Lost[_Checkpoint]:
    return Lost(None if step is None else _Checkpoint(Made(step, 0)), reason, **about)


def test_in_a_row(losses: Losses) -> None:
    losses.count(lost())
    losses.count(lost())
    losses.done()
    losses.count(lost())
    losses.count(lost())
    with pytest.raises(EvaluationError, match="a replica was lost: its process died; 3 times now, recovery.max_ref"):
        losses.count(lost())


def test_over_the_same_work(losses: Losses) -> None:
    for step in (10, 20, 10):
        losses.count(lost(step))
        losses.done()
    with pytest.raises(EvaluationError, match="a replica was lost over step-00000010: its process died; 3 times now"):
        losses.count(lost(10))


def test_what_is_raised_twice() -> None:
    """One after the other, over whatever."""
    losses = Losses(-1, EvaluationError, "evaluation")
    losses.count(lost(10, "out of memory", raised=True))
    losses.count(lost(10, "another", raised=True))
    losses.count(lost(20, "out of memory", raised=True))
    with pytest.raises(EvaluationError, match="raised: out of memory; lower reference.tokens_per_microbatch"):
        losses.count(lost(30, "out of memory", raised=True))


def test_what_would_come_again(losses: Losses) -> None:
    with pytest.raises(DataError, match="gone"):
        losses.count(lost(10, "gone", final=DataError("gone")))


def test_they_are_on_record(tmp_path: Path) -> None:
    """For a run's report; the one that ends the run is told by its outcome."""
    losses = Losses(1, EvaluationError, "evaluation", str(tmp_path))
    losses.count(lost(10))
    losses.done()
    with pytest.raises(EvaluationError):
        losses.count(lost(10))
    (fault,) = read_faults(str(tmp_path))
    assert fault.reason == "a replica of the evaluation was lost over step-00000010: its process died"
    assert abs((datetime.now(UTC) - datetime.fromisoformat(fault.time)).total_seconds()) < 60


def test_those_of_one_moment_count_once() -> None:
    losses = Losses(1, EvaluationError, "evaluation")
    for _ in range(5):
        losses.count(lost())
    assert losses.pausing()
