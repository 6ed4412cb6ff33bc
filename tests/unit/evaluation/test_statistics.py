"""Intervals cover what they should, and fits are those of a library that is trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy.special import expit

from dpo_ray.errors import ComparisonError
from dpo_ray.evaluation.statistics import (
    MOST_RESAMPLED,
    Comparison,
    Estimate,
    bradley_terry,
    calibration,
    groups_of,
    length_controlled_win_rate,
    mean_estimate,
    quartiles,
    rank,
    share_estimate,
    win_rate,
)


def covered(draw: Callable[[np.random.Generator], Estimate], truth: float, times: int) -> float:
    rng = np.random.default_rng(0)
    found = [draw(rng) for _ in range(times)]
    return sum(each.low <= truth <= each.high for each in found) / times


def test_intervals_of_means_cover_the_truth_in_95_of_100() -> None:
    """Of 400 intervals at 95 % the share that covers has a standard deviation of 0.011: within three of it."""
    share = covered(lambda rng: mean_estimate(rng.gamma(4, size=150), resamples=400), truth=4.0, times=400)
    assert share == pytest.approx(0.95, abs=0.033)
    assert mean_estimate(np.arange(9.0), seed=3) == mean_estimate(np.arange(9.0), seed=3)
    assert mean_estimate(np.arange(9.0), seed=3) != mean_estimate(np.arange(9.0), seed=4)
    assert mean_estimate(np.full(5, 2.0)) == Estimate(2.0, 2.0, 2.0, 5)


def test_many_values_are_not_resampled() -> None:
    """One value more than are: the interval is a normal distribution's, and as wide within 5 %."""
    values = np.random.default_rng(0).gamma(4, size=MOST_RESAMPLED + 1)
    few, many = mean_estimate(values[:-1], resamples=1000), mean_estimate(values, resamples=0)
    assert many.high - many.value == pytest.approx(1.959964 * values.std() / math.sqrt(len(values)))
    assert many.high - many.low == pytest.approx(few.high - few.low, rel=0.05)
    assert many.value - many.low == pytest.approx(many.high - many.value)


def test_intervals_of_shares() -> None:
    """Wilson's for 1 of 10, and 10 of 10: (0.01788, 0.40415) and (0.72246, 1); with ties they cover at least 95 %."""
    one = share_estimate(np.array([1.0] + [0.0] * 9))
    assert (one.value, one.low, one.high) == pytest.approx((0.1, 0.0178762, 0.4041500), abs=1e-6)
    assert share_estimate(np.ones(10)).low == pytest.approx(0.7224672, abs=1e-6)
    assert share_estimate(np.ones(10)).high == 1.0

    def draw(ties: float) -> Callable[[np.random.Generator], Estimate]:
        wins = 0.6 - ties / 2
        return lambda rng: share_estimate(rng.choice([1.0, 0.5, 0.0], 200, p=[wins, ties, 1 - wins - ties]))

    assert covered(draw(0.0), truth=0.6, times=2000) == pytest.approx(0.95, abs=0.015)
    assert covered(draw(0.3), truth=0.6, times=2000) >= 0.95


def test_groups_by_length() -> None:
    lengths = np.array([5, 1, 3, 3, 9, 7, 8, 2])
    found = {name: places.tolist() for name, places in quartiles(lengths).items()}
    assert found == {
        "1 to 2 tokens": [1, 7],
        "3 to 3 tokens": [2, 3],
        "5 to 7 tokens": [0, 5],
        "8 to 9 tokens": [4, 6],
    }
    assert list(quartiles(np.full(4, 6))) == ["6 to 6 tokens"]


def test_groups_by_value() -> None:
    """In the values' own order, who has none last; a number and the text of it are one; many numbers in quartiles."""

    def grouped(values: Sequence[str | float | None]) -> list[tuple[str, list[int]]]:
        return [(name, places.tolist()) for name, places in groups_of(values).items()]

    assert grouped(["b", None, "a", "b"]) == [*{"a": [2], "b": [0, 3], "(no value)": [1]}.items()]
    # What a column itself calls so has no place of its own.
    assert grouped(["(no value)", "b", None]) == [*{"b": [1], "(no value)": [0, 2]}.items()]
    assert grouped([10.0, 9, 10, 0.25]) == [*{"0.25": [3], "9": [1], "10": [0, 2]}.items()]
    assert grouped([2.0, "2", "x"]) == [*{"2": [0, 1], "x": [2]}.items()]
    assert grouped([123456789.0, 123456788.0]) == [*{"123456788": [1], "123456789": [0]}.items()]
    many = [float(number) for number in range(100)]
    quarters = {f"{at}.0 to {at + 24}.0": [*range(at + 1, at + 26)] for at in (0, 25, 50, 75)}
    assert grouped([None, *many]) == [*{**quarters, "(no value)": [0]}.items()]
    assert len(groups_of([str(number) for number in range(50)])) == 50
    with pytest.raises(ValueError, match="has 51 different values, more than 50"):
        groups_of([str(number) for number in range(51)])


def test_win_rate_with_ties() -> None:
    found = win_rate(np.array([1, 1, 0.5, 0.5, 0.5, 0, 0, 0, 0, 0]), np.zeros(10))
    assert (found.wins, found.ties, found.losses) == (2, 3, 5)
    assert found.rate.value == 0.35


def test_length_control_takes_out_what_length_alone_wins() -> None:
    """Outcomes by length alone: 0.5 is what the regression must find, whatever the plain rate says.

    And with the model's own strength of 0.8 besides, sigma(0.8) = 0.69; of 40 intervals at 95 % at least 34 cover
    it, but for once in 300.
    """
    rng = np.random.default_rng(0)

    def draw(strength: float, num: int) -> tuple[np.ndarray, np.ndarray]:
        longer = rng.normal(60, 50, num).round()
        chance = expit(strength + 1.5 * np.tanh(longer / longer.std()))
        return (rng.random(num) < chance).astype(float), longer

    outcomes, longer = draw(0.0, 4000)
    assert outcomes.mean() > 0.65
    assert length_controlled_win_rate(outcomes, longer, resamples=10).value == pytest.approx(0.5, abs=0.06)
    found = [length_controlled_win_rate(*draw(0.8, 300), resamples=80) for _ in range(40)]
    assert sum(each.low <= expit(0.8) <= each.high for each in found) >= 34
    # All are won: the plain maximum is infinite, with the prior it is finite.
    always = length_controlled_win_rate(np.ones(50), np.arange(50.0), resamples=10)
    assert 0.9 < always.value < 1.0
    # All of the same length: the plain rate.
    same = length_controlled_win_rate(np.array([1.0, 1, 1, 0] * 25), np.zeros(100), resamples=10)
    assert same.value == pytest.approx(0.75, abs=1e-3)


def tournament(rng: np.random.Generator, models: int, games: int) -> list[tuple[int, int]]:
    """Pairs of winner and loser, of models of random strength."""
    strengths, found = rng.normal(size=models), []
    for _ in range(games):
        first, second = rng.choice(models, 2, replace=False)
        won = rng.random() < expit(strengths[first] - strengths[second])
        found.append((int(first), int(second)) if won else (int(second), int(first)))
    return found


def table(won: list[tuple[int, int]], models: int) -> np.ndarray:
    wins = np.zeros((models, models))
    for winner, loser in won:
        wins[winner, loser] += 1
    return wins


def test_strengths_are_those_of_choix() -> None:
    choix = pytest.importorskip("choix", reason="needs choix, of the extra `dev`")
    rng = np.random.default_rng(0)
    for models, games in ((2, 30), (5, 200), (12, 2000)):
        won = tournament(rng, models, games)
        names, wins = list(map(str, range(models))), table(won, models)
        for prior_std in (None, 0.5):
            # Its penalty is alpha times the sum of squares, half of which is a normal density's.
            penalty = 0.0 if prior_std is None else prior_std**-2 / 2
            expected = choix.opt_pairwise(models, won, alpha=penalty, method="Newton-CG", tol=1e-12)
            assert bradley_terry(names, wins, prior_std) == pytest.approx(expected - expected.mean(), abs=1e-6)


def test_what_tutorials_give_as_an_answer_has_no_finite_one() -> None:
    """A>B, C>A, A>D, B>C, B>D, C>D: D never wins, and each win of the others' could be ever surer."""
    won = [(0, 1), (2, 0), (0, 3), (1, 2), (1, 3), (2, 3)]
    message = r"^D has never won against another: the likelihood has no finite maximum\. .*evaluation.prior_std: 1.0"
    with pytest.raises(ComparisonError, match=message):
        bradley_terry("ABCD", table(won, 4))
    # A, B and C have beaten each other in a circle, and D: alike but for D.
    found = bradley_terry("ABCD", table(won, 4), prior_std=1.0)
    assert found[:3] == pytest.approx([found[0]] * 3, abs=1e-8)
    assert found[3] < found[0]
    assert np.isfinite(found).all()
    # Anyone else's defeat by D makes it finite.
    assert np.isfinite(bradley_terry("ABCD", table([*won, (3, 0)], 4))).all()


@pytest.mark.parametrize(
    ("won", "message"),
    [
        ([(0, 1), (1, 0), (2, 3), (3, 2)], "A, B and C, D were never compared with each other: compare some of them"),
        ([(0, 1), (0, 2), (0, 3), (1, 2), (2, 3), (3, 1)], "^A has never lost against another: the likelihood"),
        ([(0, 1), (1, 2), (2, 3)], "^A has never lost against another; D has never won against another: the"),
        (
            [(0, 1), (1, 0), (0, 2), (2, 3), (3, 2)],
            "^C, D have never won against another: the likelihood",
        ),
    ],
)
def test_what_has_no_finite_maximum_is_refused_by_name(won: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ComparisonError, match=message):
        bradley_terry("ABCD", table(won, 4))
    assert np.isfinite(bradley_terry("ABCD", table(won, 4), prior_std=1.0)).all()


def test_ranking_with_intervals() -> None:
    """A against B: 60 wins, 20 ties of 100 is sigma(s) = 0.7; B against C 50 wins: A is 2/3 s, B and C are -1/3 s."""
    outcomes = [1.0] * 60 + [0.5] * 20 + [0.0] * 20
    comparisons = [Comparison(prompt, "A", "B", outcome) for prompt, outcome in enumerate(outcomes)]
    comparisons += [Comparison(prompt, "B", "C", float(prompt % 2)) for prompt in range(100)]
    found, strength = rank(comparisons), np.log(0.7 / 0.3)
    values = {name: each.value for name, each in found.strengths.items()}
    assert values == pytest.approx({"A": 2 / 3 * strength, "B": -strength / 3, "C": -strength / 3}, abs=1e-6)
    assert next(iter(found.strengths)) == "A"
    assert found.intervals
    assert all(each.low < each.value < each.high for each in found.strengths.values())
    assert found.strengths["B"].num == 200
    # One defeat in a hundred is in 63 of 100 resamples: without it no fit is finite.
    once = rank([Comparison(prompt, "A", "B", float(prompt > 0)) for prompt in range(100)])
    assert not once.intervals
    assert once.left_out > 100
    assert rank([Comparison(0, "A", "B", 1.0)], prior_std=1.0, resamples=20).intervals


def test_calibration_of_drawn_preferences() -> None:
    """Answers drawn with probability sigma(margin) are calibrated; twice as sure a model is not.

    Half of the pairs have margin 2, half 0: drawn by sigma(1) the first are right in 73 of 100, and said to be in 88.
    """
    rng = np.random.default_rng(0)
    size = rng.normal(0, 2, 20_000)
    margins = np.where(rng.random(len(size)) < expit(size), size, -size)
    assert calibration(margins).error < 0.015
    assert calibration(2 * margins).error > 0.05
    found = calibration(np.array([2.0] * 73 + [-2.0] * 27 + [0.0] * 100))
    assert found.error == pytest.approx((expit(2) - 0.73) / 2)
    assert [(each["pairs"], each["accuracy"]) for each in found.bins] == [(100, 0.5), (100, pytest.approx(0.73))]
