"""What one sees in the terminal while something runs."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from rich.progress import Task

from dpo_ray.display import ProgressBar
from dpo_ray.pairs.plan import Plan


def bar_of(bar: ProgressBar, what: str) -> Task:
    return next(task for task in bar._progress.tasks if task.description == what)


@pytest.fixture
def written() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def bar(written: io.StringIO) -> ProgressBar:
    return ProgressBar(Console(file=written, force_terminal=False, width=100))


def test_a_bar_that_is_full_is_shown_again_for_the_next_run(bar: ProgressBar) -> None:
    """As in a sweep: of another length, from nothing, with a time of its own."""
    with bar:
        for done in (0, 5, 10, 10):
            bar.progress("scoring", done, 10)
        assert not bar_of(bar, "scoring").visible
        for done in (0, 7):
            bar.progress("scoring", done, 20)
            task = bar_of(bar, "scoring")
            assert (task.visible, task.finished, task.completed, task.total) == (True, False, done, 20)
            assert task.fields == {"count": f"{done}/20", "metrics": ""}
        bar.progress("scoring", 20, 20)
        assert not bar_of(bar, "scoring").visible
        assert len(bar._progress.tasks) == 1


def test_a_full_bar_that_is_told_so_again_stays_away(bar: ProgressBar, written: io.StringIO) -> None:
    """What is asked now and then how far it is may say so more than once; a line without a terminal comes once."""
    with bar:
        for done in (10, 10, 10):
            bar.progress("scoring", done, 10)
            assert not bar_of(bar, "scoring").visible
    assert written.getvalue().count("scoring 10/10") == 1


def test_the_training_of_the_next_run_has_time_left(bar: ProgressBar) -> None:
    """The first one's bar is full: its time is not the next one's."""
    line: dict[str, Any] = {"loss": 0.5, "step": 4}
    with bar:
        for position in (0, 2):
            bar.planned(cast(Plan, SimpleNamespace(total_steps=4)), position)
            task = bar_of(bar, "training")
            assert (task.finished, task.completed, task.fields) == (
                False,
                position,
                {"count": f"{position}/4", "metrics": ""},
            )
            bar.line(line)
            assert task.finished
            assert task.fields["count"] == "4/4"
