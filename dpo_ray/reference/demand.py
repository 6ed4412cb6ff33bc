"""How many replicas of the reference a trainer needs: a formula."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Scores shall be there this much before they are needed, and a pool that has fallen behind makes up for it in as long.
AHEAD_S, CATCH_UP_S = 120.0, 120.0
# A pool that only just kept up would fall behind at the first lost replica.
HEADROOM = 1.1


@dataclass(frozen=True, slots=True)
class Demand:
    """The limits of a pool.

    Attributes:
        least: Replicas kept as long as there is work.
        most: Never more.
    """

    least: int
    most: int

    def replicas(self, now: int, ahead_pairs: int, trained_per_s: float | None, scored_per_s: float | None) -> int:
        """How many there should be.

        As many as train speed asks for, and what it takes to be `AHEAD_S` ahead again within `CATCH_UP_S`. Fewer than
        now only when the scores are that far ahead. As many as allowed, before anything is known.

        Args:
            now: How many there are.
            ahead_pairs: Pairs that are scored and not trained on yet, in the order of need without a gap.
            trained_per_s: Pairs a second that the trainer takes when it need not wait; None: it has not begun.
            scored_per_s: Pairs a second that one replica scores; None: none has finished a chunk.
        """
        if not trained_per_s or not scored_per_s:
            return self.most
        short = max(0.0, AHEAD_S * trained_per_s - ahead_pairs)
        wanted = math.ceil((HEADROOM * trained_per_s + short / CATCH_UP_S) / scored_per_s)
        if wanted < now and short:
            wanted = now
        return min(max(wanted, self.least), self.most)
