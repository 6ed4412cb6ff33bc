"""How a driver's end goes on record, whatever it is."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import pytest

from dpo_ray.errors import FinalError, LeaseLostError, RecoveryError, StoppedError
from dpo_ray.orchestration.trainer import _on_record
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.training.outcome import read_outcome


class Warned(Watcher):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings = list[str]()

    def warning(self, text: str) -> None:
        self.warnings.append(text)


@pytest.mark.parametrize(
    ("error", "recorded"),
    [
        (None, "finished"),
        (RecoveryError("once too often"), "failed"),
        (StoppedError("asked", signal.SIGTERM), "stopped"),
        (LeaseLostError("another driver has it"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_ends(tmp_path: Path, error: BaseException | None, recorded: str | None) -> None:
    """What another driver owns, and a second signal that means at once, leave the folder alone."""
    run, watcher = str(tmp_path / "run"), Warned()
    expected = contextlib.nullcontext() if error is None else pytest.raises(type(error))
    with expected, _on_record(run, 3, watcher):
        if error is not None:
            raise error
    found = read_outcome(run)
    assert (found and found.outcome) == recorded
    assert (found is None) == (not Path(run, "report.html").exists())
    if found is not None:
        assert (found.generation, found.message) == (3, str(error or ""))
    assert watcher.warnings == []


def test_a_report_that_cannot_be_written_fails_nothing(tmp_path: Path) -> None:
    """A file stands where the run's folder should be."""
    (tmp_path / "run").write_text("")
    watcher = Warned()
    with _on_record(str(tmp_path / "run"), 1, watcher):
        pass
    with pytest.raises(FinalError, match="the real reason"), _on_record(str(tmp_path / "run"), 1, watcher):
        raise FinalError("the real reason")
    assert len(watcher.warnings) == 2
    assert all("the run's report could not be written: " in text for text in watcher.warnings)
