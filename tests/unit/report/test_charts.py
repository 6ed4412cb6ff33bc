"""The geometry of charts: no extreme is lost, scales enclose what they show."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.report.charts import (
    BOTTOM,
    COLUMNS,
    HEIGHT,
    PROBES,
    TABLE_ROWS,
    TOP,
    WHOLE_SERIES,
    Interval,
    Series,
    Spot,
    extremes,
    frontier_chart,
    line_chart,
    number,
    on_frontier,
    ticks,
)


def test_a_curve_of_a_hundred_thousand_steps_keeps_its_spikes() -> None:
    """One step in the middle of nowhere is far above all others, one far below."""
    x = np.arange(1, 100_001)
    y = np.sin(x / 1000.0)
    y[31_415], y[92_653] = 7.0, -5.0
    kept_x, kept_y = extremes(x, y, COLUMNS)
    assert len(kept_x) <= 4 * COLUMNS
    assert (kept_x[0], kept_x[-1]) == (1, 100_000)
    assert (np.diff(kept_x) > 0).all()
    assert dict(zip(kept_x.tolist(), kept_y.tolist(), strict=True)).items() >= {(31_416, 7.0), (92_654, -5.0)}
    chart = line_chart("t", "", [Series("a", 0, x, y)])
    assert chart is not None
    assert "least −5, greatest 7" in chart.summary
    assert "every 625 steps" in chart.notes[0]
    assert any("−5 to" in row[1] for row in chart.rows)
    assert len(chart.series[0].thin) < 10_000


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9), st.integers(2, 8))
def test_ticks_enclose_their_range(low: float, span: float, most: int) -> None:
    high = low + span
    found = ticks(low, high, most)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= most + 2
    assert found == sorted(found)


def test_ticks_are_round() -> None:
    assert ticks(0.0, 0.69, 5) == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert ticks(-11.8, -2.3, 5) == [-12.0, -10.0, -8.0, -6.0, -4.0, -2.0]
    assert ticks(3.0, 3.0, 4) == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-2.5, "−2.5"), (0.0667201, "0.06672"), (5e-7, "5e−7"), (162.5111, "162.5"), (1234567.0, "1,234,567")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_points_lie_where_they_should() -> None:
    """A curve from 0 to 1 over steps 0 to 10: the lower left corner of the plot, and its upper right."""
    chart = line_chart("t", "", [Series("a", 0, np.array([0, 10]), np.array([0.0, 1.0]))], [(5, "attempt 1")])
    assert chart is not None
    assert chart.series[0].thin == f"M48 {HEIGHT - BOTTOM:g}L352 {TOP:g}"
    assert [mark.at for mark in chart.marks] == [200.0]
    assert chart.header == ("step", "a")
    assert chart.rows == (("0", "0"), ("10", "1"))


def test_a_slow_first_step_does_not_flatten_the_rest() -> None:
    """Only where it is asked for, and with a mark and a note of what lies beyond the scale."""
    y = np.ones(100)
    y[0] = 60.0
    series = [Series("a", 0, np.arange(1, 101), y)]
    cut, whole = (line_chart("t", "s", series, cut=cut) for cut in (True, False))
    assert cut is not None
    assert whole is not None
    assert cut.y_ticks[-1].label == "1.25"
    assert len(cut.series[0].cut) == 1
    assert cut.notes == ("▲ 1 of 100 values lie beyond the scale, up to 60",)
    assert whole.series[0].cut == ()
    assert float(whole.y_ticks[-1].label) >= 60


def test_many_curves_share_what_a_page_holds() -> None:
    """Few are drawn as one is; of many each has fewer points, and the spike is still there."""
    x = np.arange(1, 1001)
    y = np.sin(x / 100.0)
    y[314] = 7.0
    one, few, many = (
        line_chart("t", "", [Series(str(number), 0, x, y, dots=number == 1) for number in range(num)])
        for num in (1, WHOLE_SERIES, 6 * WHOLE_SERIES)
    )
    assert one is not None
    assert few is not None
    assert many is not None
    assert (few.series[0].thin, few.series[0].thick) == (one.series[0].thin, one.series[0].thick)
    assert (len(few.probes), len(few.rows)) == (len(one.probes), len(one.rows)) == (PROBES, TABLE_ROWS)
    assert (len(many.probes), len(many.rows)) == (PROBES // 6, 4)  # No fewer than four.
    assert len(many.series[0].thin) < len(one.series[0].thin) / 5
    assert len(many.series[1].dots) < COLUMNS // 6
    for each in (*many.series[0].thin.split("L"), *(f"{x:g} {y:g}" for x, y in many.series[1].dots)):
        assert float(each.split()[1]) >= TOP
    assert min(y for _, y in many.series[1].dots) == min(y for _, y in few.series[1].dots)
    assert "least −1, greatest 7" in many.summary
    assert many.notes == ("Thin: least and greatest of every 39 steps; thick: means",)


def test_nothing_to_draw() -> None:
    assert line_chart("t", "", [Series("a", 0, np.array([1]), np.array([np.nan]))]) is None


def test_points_that_no_other_one_beats() -> None:
    """Of equals both stay; one that gains less at the same cost, or the same at more, goes."""
    cost = [1.0, 2.0, 2.0, 2.0, 3.0, 4.0, 0.5]
    gain = [0.6, 0.7, 0.7, 0.69, 0.7, 0.65, 0.1]
    assert on_frontier(cost, gain) == [True, True, True, False, False, False, True]


def test_a_frontier_is_drawn_through_the_best_with_intervals() -> None:
    """KL from 0 to 4, accuracy from 0 to 1: the plot's corners are (48, 180) and (352, 10)."""
    spots = [
        Spot("a", 0, Interval(1.0, 0.0, 2.0), Interval(0.5, 0.0, 1.0)),
        Spot("b", 1, Interval(2.0, 2.0, 2.0), Interval(1.0, 1.0, 1.0)),
        Spot("c", 2, Interval(3.0, 2.0, 4.0), Interval(0.5, 0.5, 0.5)),
    ]
    chart = frontier_chart("Accuracy", "share", "KL", spots)
    line, first, *_ = chart.series
    assert line.thick == "M124 95L200 10"
    assert first.dots == ((124.0, 95.0),)
    assert first.thin == "M48 95L200 95M124 180L124 10"
    assert chart.summary == "On the frontier: a, b"
    assert chart.header == ("run", "KL", "Accuracy", "frontier")
    assert chart.rows[0] == ("a", "1 (0 to 2)", "0.5 (0 to 1)", "yes")
    assert chart.rows[2][3] == ""
    assert [probe.text for probe in chart.probes][2] == "c: KL 3 (2 to 4), Accuracy 0.5 (0.5 to 0.5)"
