"""How many replicas a trainer needs."""

import pytest

from dpo_ray.reference.demand import AHEAD_S, CATCH_UP_S, HEADROOM, Demand

FAR = 10**9


@pytest.mark.parametrize(
    ("now", "ahead_pairs", "trained_per_s", "scored_per_s", "wanted"),
    [
        # Nothing is known: as many as allowed.
        (0, 0, None, None, 16),
        (4, FAR, None, 3.0, 16),
        (4, FAR, 3.0, None, 16),
        # Far ahead: what keeps pace, with headroom. 10 * 1.1 / 3 = 3.67.
        (16, FAR, 10.0, 3.0, 4),
        # Exactly as far ahead as it shall be.
        (16, 10 * int(AHEAD_S), 10.0, 3.0, 4),
        # Nothing ahead: 10 * 120 pairs more within 120 s, 21 / 3 = 7.
        (4, 0, 10.0, 3.0, 7),
        # Not far enough ahead: fewer would do, and none goes.
        (8, 10 * int(AHEAD_S) - 1, 10.0, 3.0, 8),
        # The limits.
        (1, 0, 100.0, 1.0, 16),
        (4, FAR, 0.001, 100.0, 2),
    ],
)
def test_replicas(
    now: int, ahead_pairs: int, trained_per_s: float | None, scored_per_s: float | None, wanted: int
) -> None:
    assert (AHEAD_S, CATCH_UP_S, HEADROOM) == (120, 120, 1.1)
    assert Demand(2, 16).replicas(now, ahead_pairs, trained_per_s, scored_per_s) == wanted
