"""When a group stands still, and when it only takes its time."""

from __future__ import annotations

import pytest

from dpo_ray.orchestration.monitor import (
    ENDED,
    SLOW_STEPS,
    START_S,
    STARTING,
    STORAGE,
    Beat,
    Place,
    Report,
    Slow,
    has_excuse,
    stalled,
)
from dpo_ray.types import WAITING

LIMIT_S = 10.0


def report(*ranks: tuple[str, float], silent_s: float = 0.5) -> Report:
    """What the ranks are doing, and since when; the last of them is silent."""
    found = Report()
    for rank, (doing, since_s) in enumerate(ranks):
        found.beats[rank] = Beat(rank, Place("node", 1, None), doing, since_s, [])
        found.silent_s[rank] = 0.5
    found.silent_s[len(ranks) - 1] = silent_s
    return found


@pytest.mark.parametrize(
    "quiet",
    [
        report(("step 3", LIMIT_S - 1), ("step 3", LIMIT_S - 1)),
        report(("step 3", 1.0), (ENDED, 1000.0), silent_s=1000.0),
        report(("step 3", 1.0), (STARTING, 5.0), silent_s=LIMIT_S + 1),
        report((STARTING, START_S + LIMIT_S), (STARTING, 5.0)),
    ],
)
def test_these_only_take_their_time(quiet: Report) -> None:
    assert stalled(quiet, LIMIT_S, no_excuse_s=1000.0) is None


@pytest.mark.parametrize(
    ("ranks", "excused"),
    [
        ((("step 3", 11.0), (STORAGE, 1000.0)), True),
        ((("step 3", 11.0), (WAITING, 1000.0)), True),
        ((("loading the model", 11.0), (STARTING, 11.0)), True),
        ((("loading the model", 11.0), (STARTING, START_S + 1)), False),
        ((("step 3", 11.0), ("step 3", 1000.0)), False),
        ((("step 3", 11.0), (ENDED, 1000.0)), False),
    ],
)
def test_excuses(ranks: tuple[tuple[str, float], ...], excused: bool) -> None:
    assert has_excuse(report(*ranks)) == excused


def test_an_excuse_is_good_for_those_who_waited_with_it() -> None:
    """The storage answers again: the other rank has stood there for an hour, and now needs a moment."""
    after = report(("step 3", 3600.0), ("checkpoint of step 3", 3600.0))
    assert stalled(after, LIMIT_S, no_excuse_s=LIMIT_S - 1) is None
    assert stalled(after, LIMIT_S, no_excuse_s=LIMIT_S + 1) == "ranks 0, 1 stood still for 10 s (step 3)"


@pytest.mark.parametrize(
    ("still", "said"),
    [
        (report(("step 3", LIMIT_S + 1), ("step 3", 1.0)), "rank 0 stood still for 10 s (step 3)"),
        (report(("step 3", 11.0), ("step 3", 11.0)), "ranks 0, 1 stood still for 10 s (step 3)"),
        (report(("step 3", 1.0), ("step 3", 1.0), silent_s=11.0), "rank 1 gave no sign of life for 10 s"),
        (report((WAITING, 1.0), (WAITING, 1.0), silent_s=11.0), "rank 1 gave no sign of life for 10 s"),
        (
            report(("loading the model", 5.0), (STARTING, START_S + LIMIT_S + 1)),
            f"rank 1 stood still for {START_S + LIMIT_S:g} s (starting)",
        ),
    ],
)
def test_these_stand_still(still: Report, said: str) -> None:
    assert stalled(still, LIMIT_S, no_excuse_s=LIMIT_S + 1) == said


def told_of(lines: list[tuple[int, float]]) -> list[tuple[int, float]]:
    slow = Slow()
    found = [slow.line({"perf/slowest_rank": rank, "perf/rank_spread": spread}) for rank, spread in lines]
    return [each for each in found if each is not None]


def test_a_rank_that_all_wait_for_is_told_of_once() -> None:
    assert told_of([(3, 1.5)] * (SLOW_STEPS - 1)) == []
    assert told_of([(3, 1.5)] * (SLOW_STEPS - 1) + [(3, 2.0)] * 200) == [(3, 1.5 + 0.5 / SLOW_STEPS)]
    assert told_of(([(3, 1.5)] * SLOW_STEPS + [(1, 1.5)] * SLOW_STEPS) * 2) == [(3, 1.5), (1, 1.5)]


def test_ranks_that_are_slow_by_chance_are_not() -> None:
    assert told_of([(step % 2, 9.0) for step in range(500)]) == []
    assert told_of(([(3, 9.0)] * (SLOW_STEPS - 1) + [(3, 1.1)]) * 3) == []
    assert Slow().line({"loss": 0.5}) is None
