"""When a group stands still, and when it only takes its time."""

from __future__ import annotations

import pytest

from dpo_ray.orchestration.monitor import ENDED, START_S, STARTING, STORAGE, Beat, Place, Report, stalled
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
        report(("step 3", LIMIT_S + 1), (STORAGE, 1000.0)),
        report(("step 3", LIMIT_S + 1), (WAITING, 1000.0)),
        report(("loading the model", LIMIT_S + 1), (STARTING, LIMIT_S + 1)),
        report(("step 3", 1.0), (ENDED, 1000.0), silent_s=1000.0),
        report(("step 3", 1.0), (STARTING, 5.0), silent_s=LIMIT_S + 1),
    ],
)
def test_these_only_take_their_time(quiet: Report) -> None:
    assert stalled(quiet, LIMIT_S) is None


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
    assert stalled(still, LIMIT_S) == said
