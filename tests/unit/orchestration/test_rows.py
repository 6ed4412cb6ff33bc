"""Numbers that stand in columns beside a pair."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_ray.errors import RowError
from dpo_ray.orchestration.rows import _number, _score

HUGE = 10**400


@pytest.mark.parametrize("value", [HUGE, -HUGE, float("inf"), float("nan"), True, "1", None])
def test_what_is_no_number_to_compute_with_is_a_reject(value: Any) -> None:
    with pytest.raises(RowError, match="column is .*: reference.columns wants the log-probability"):
        _score({"column": value}, "column")
    for name in ("weight", "margin"):
        with pytest.raises(RowError, match=f"column is .*: data.{name}_column wants a finite number there"):
            _number({"column": value}, name, "column")


def test_numbers_in_their_ranges() -> None:
    assert (_score({"c": -2}, "c"), _number({"c": 0}, "weight", "c"), _number({"c": -3}, "margin", "c")) == (-2, 0, -3)
    with pytest.raises(RowError, match=r"c is 0.5: .* at most 0"):
        _score({"c": 0.5}, "c")
    with pytest.raises(RowError, match=r"c is -0.5: data.weight_column wants a finite number there, 0 or more"):
        _number({"c": -0.5}, "weight", "c")
