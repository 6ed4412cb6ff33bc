"""When replicas are lost too often."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.errors import DataError, EvaluationError
from dpo_ray.orchestration import replicas
from dpo_ray.orchestration.evaluator import _Checkpoint
from dpo_ray.orchestration.replicas import Lost, ReplicaFailures
from dpo_ray.training.evaluations import Made
from dpo_ray.training.faults import read_faults


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> ReplicaFailures:
    """Two are survived, each of which counts."""
    monkeypatch.setattr(replicas, "LOST_PAUSE_S", -1.0)
    return ReplicaFailures(2, EvaluationError, "evaluation")


def lost(step: int | None = None, reason: str = "its process died", **about: Any) -> Lost[_Checkpoint]:
    return Lost(None if step is None else _Checkpoint(Made(step, 0)), reason, **about)


def test_in_a_row(failures: ReplicaFailures) -> None:
    failures.count(lost())
    failures.count(lost())
    failures.done()
    failures.count(lost())
    failures.count(lost())
    with pytest.raises(EvaluationError, match="a replica was lost: its process died; 3 times now, recovery.max_ref"):
        failures.count(lost())


def test_over_the_same_work(failures: ReplicaFailures) -> None:
    for step in (10, 20, 10):
        failures.count(lost(step))
        failures.done()
    with pytest.raises(EvaluationError, match="a replica was lost over step-00000010: its process died; 3 times now"):
        failures.count(lost(10))


def test_what_is_raised_twice() -> None:
    """One after the other, over whatever."""
    failures = ReplicaFailures(-1, EvaluationError, "evaluation")
    failures.count(lost(10, "out of memory", raised=True))
    failures.count(lost(10, "another", raised=True))
    failures.count(lost(20, "out of memory", raised=True))
    with pytest.raises(EvaluationError, match="raised: out of memory; lower reference.tokens_per_microbatch"):
        failures.count(lost(30, "out of memory", raised=True))


def test_what_would_come_again(failures: ReplicaFailures) -> None:
    with pytest.raises(DataError, match="gone"):
        failures.count(lost(10, "gone", final=DataError("gone")))


def test_they_are_on_record(tmp_path: Path) -> None:
    """For a run's report; the one that ends the run is told by its outcome."""
    failures = ReplicaFailures(1, EvaluationError, "evaluation", str(tmp_path))
    failures.count(lost(10))
    failures.done()
    with pytest.raises(EvaluationError):
        failures.count(lost(10))
    (fault,) = read_faults(str(tmp_path))
    assert fault.reason == "a replica of the evaluation was lost over step-00000010: its process died"
    assert abs((datetime.now(UTC) - datetime.fromisoformat(fault.time)).total_seconds()) < 60


def test_those_of_one_moment_count_once() -> None:
    failures = ReplicaFailures(1, EvaluationError, "evaluation")
    for _ in range(5):
        failures.count(lost())
    assert failures.pausing()
