"""How sure one can be: intervals, win rates, a ranking of several models, calibration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, log_expit
from scipy.stats import bootstrap, norm

from dpo_ray.errors import ComparisonError

LEVEL = 0.95
RESAMPLES, MOST_RESAMPLED = 2000, 20_000
# Numbers that a bootstrap holds at a time.
BATCH_NUMBERS = 10_000_000
# Standard deviation of the normal prior that keeps the length-controlled regression finite where one side always wins.
LENGTH_PRIOR_STD = 10.0
# A ranking has no intervals where more than this share of the resamples has no finite fit.
MOST_LEFT_OUT = 0.01
CALIBRATION_BINS = 10
# By a column of the data, and the one of pairs that have nothing there.
MOST_GROUPS, NO_VALUE = 50, "(no value)"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its interval.

    Attributes:
        value: The estimate.
        low: Lower end of the interval at `LEVEL`.
        high: Its upper end.
        num: How many values it is of.
    """

    value: float
    low: float
    high: float
    num: int


def mean_estimate(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """A mean with its percentile bootstrap interval; of more than `MOST_RESAMPLED` values a normal distribution's.

    Of so many the two are the same to within what 2,000 resamples leave open, and resampling would take hours.

    Args:
        values: Shape (N,), one for each pair, N > 0. They are taken for independent.
        seed: Of the resampling.
        resamples: How many.
    """
    values = np.asarray(values, np.float64)
    if np.ptp(values) == 0:
        return Estimate(float(values[0]), float(values[0]), float(values[0]), len(values))
    if len(values) > MOST_RESAMPLED:
        return known_estimate(float(values.mean()), float(values.std() / np.sqrt(len(values))), len(values))
    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, BATCH_NUMBERS // len(values)),
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def share_estimate(values: np.ndarray) -> Estimate:
    """A mean of values in [0, 1], such as wins with ties as one half, with Wilson's score interval.

    Unlike a bootstrap's it has a width where all values are the same. Values between 0 and 1 vary less than wins and
    losses of the same mean, so that with many ties it is wider than need be.

    Args:
        values: Shape (N,), in [0, 1], N > 0. They are taken for independent.
    """
    num, share, z = len(values), float(np.mean(values)), float(norm.ppf(0.5 + LEVEL / 2))
    middle = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z * np.sqrt(share * (1 - share) / num + z * z / (4 * num * num)) / (1 + z * z / num)
    # Rounding shall not put the estimate outside.
    return Estimate(share, float(min(share, max(0.0, middle - half))), float(max(share, min(1.0, middle + half))), num)


def known_estimate(value: float, standard_error: float, num: int) -> Estimate:
    """A value with the interval of a normal distribution.

    Args:
        value: The estimate.
        standard_error: Its own; NaN where that is not known: there is no interval then.
        num: How many values it is of.
    """
    half = float(norm.ppf(0.5 + LEVEL / 2)) * standard_error
    return Estimate(value, value - half, value + half, num)


def quartiles(lengths: np.ndarray, unit: str = "tokens") -> dict[str, np.ndarray]:
    """Pairs by length, in up to four groups of nearly the same size.

    Args:
        lengths: Shape (N,), whole numbers.
        unit: Of a length, for the names of the groups.

    Returns:
        The places of each group's pairs in `lengths`, by the group's name, shorter ones first.
    """
    edges = np.quantile(lengths, [0.25, 0.5, 0.75], method="inverted_cdf")
    group = np.searchsorted(edges, lengths, side="left")
    found = [np.flatnonzero(group == number) for number in range(4)]
    return {f"{lengths[each].min()} to {lengths[each].max()} {unit}".rstrip(): each for each in found if len(each)}


def groups_of(values: Sequence[str | float | None]) -> dict[str, np.ndarray]:
    """Pairs by a value, in its order; by quartiles where they are numbers and more than `MOST_GROUPS` different ones.

    Args:
        values: Shape (N,), N > 0: texts, numbers, or None where a pair has no value.

    Returns:
        The places of each group's pairs in `values`, by the group's name; last those without a value, or with
        `NO_VALUE` for one.

    Raises:
        ValueError: There are more than `MOST_GROUPS` different texts.
    """
    values = [None if value == NO_VALUE else value for value in values]
    places = defaultdict[str, list[int]](list)
    for place, value in enumerate(values):
        if value is not None:
            places[value if isinstance(value, str) else f"{value:.15g}"].append(place)
    there = [value for value in values if value is not None]
    numbers = np.array([value for value in there if not isinstance(value, str)], np.float64)
    numeric = len(numbers) == len(there)
    if len(places) <= MOST_GROUPS:
        order = sorted(places, key=float if numeric else str)
        found = {name: np.array(places[name]) for name in order}
    elif numeric:
        at = np.array([place for place, value in enumerate(values) if value is not None])
        found = {name: at[each] for name, each in quartiles(numbers, unit="").items()}
    else:
        raise ValueError(f"has {len(places):,} different values, more than {MOST_GROUPS}")
    missing = np.array([place for place, value in enumerate(values) if value is None], np.int64)
    return {**found, NO_VALUE: missing} if len(missing) else found


@dataclass(frozen=True, slots=True)
class WinRate:
    """How often one model's answers are preferred to another's.

    Attributes:
        wins: Answers preferred.
        ties: Neither.
        losses: The other's preferred.
        rate: (wins + ties / 2) / all.
        length_controlled: What the rate would be with answers of the same length, see `length_controlled_win_rate`.
    """

    wins: int
    ties: int
    losses: int
    rate: Estimate
    length_controlled: Estimate


def win_rate(outcomes: np.ndarray, longer: np.ndarray, seed: int = 0) -> WinRate:
    """The win rate, as it is and length-controlled.

    Args:
        outcomes: Shape (N,): 1 where the model wins, 1/2 for a tie, 0 where it loses.
        longer: Shape (N,): by how much the model's answer is longer.
        seed: Of the resampling.
    """
    wins, ties, losses = (int((outcomes == value).sum()) for value in (1.0, 0.5, 0.0))
    return WinRate(wins, ties, losses, share_estimate(outcomes), length_controlled_win_rate(outcomes, longer, seed))


def length_controlled_win_rate(
    outcomes: np.ndarray, longer: np.ndarray, seed: int = 0, resamples: int = 500
) -> Estimate:
    """The win rate as it would be if both answers had the same length, with its percentile bootstrap interval.

    AlpacaEval 2's regression for two models: P(win) = sigma(theta + phi tanh(d / std(d))), d the difference in length;
    the rate is sigma(theta). Simpler than there: its third term, how hard an instruction is, needs the answers of many
    models and is left out; and in place of its cross-validated penalties theta and phi have a normal prior of standard
    deviation `LENGTH_PRIOR_STD`, so wide that it matters only where one side wins nearly always.

    Args:
        outcomes: Shape (N,): 1 where the model wins, 1/2 for a tie, 0 where it loses.
        longer: Shape (N,): by how much the model's answer is longer.
        seed: Of the resampling.
        resamples: How many.

    Source: arXiv 2404.04475 section 3.
    """
    rng, num = np.random.default_rng(seed), len(outcomes)
    fitted = _same_length_rate(outcomes, longer)
    drawn = [rng.integers(num, size=num) for _ in range(resamples)]
    low, high = np.quantile([_same_length_rate(outcomes[each], longer[each]) for each in drawn], _tails())
    return Estimate(fitted, float(low), float(high), num)


def _same_length_rate(outcomes: np.ndarray, longer: np.ndarray) -> float:
    spread = float(np.std(longer))
    design = np.stack([np.ones(len(longer)), np.tanh(longer / spread) if spread else np.zeros(len(longer))], axis=1)
    return float(expit(_logistic(design, outcomes, LENGTH_PRIOR_STD)[0]))


def _logistic(design: np.ndarray, outcomes: np.ndarray, prior_std: float) -> np.ndarray:
    """The most probable coefficients of a logistic regression under a normal prior: Shape (K,).

    Newton's method; the prior makes the objective strictly concave.

    Args:
        design: Shape (N, K).
        outcomes: Shape (N,), in [0, 1].
        prior_std: Of each coefficient.
    """
    precision = np.eye(design.shape[1]) / prior_std**2

    def loss(found: np.ndarray) -> float:
        scores = design @ found
        likelihood = outcomes @ log_expit(scores) + (1 - outcomes) @ log_expit(-scores)
        return float(found @ precision @ found / 2 - likelihood)

    def gradient(found: np.ndarray) -> np.ndarray:
        return np.asarray(precision @ found - design.T @ (outcomes - expit(design @ found)))

    def hessian(found: np.ndarray) -> np.ndarray:
        chance = expit(design @ found)
        return np.asarray(precision + (design * (chance * (1 - chance))[:, None]).T @ design)

    return _newton(loss, gradient, hessian, np.zeros(design.shape[1]))


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a judge said of two models' answers to one prompt.

    Attributes:
        prompt: Its number: comparisons of one prompt are drawn together when resampling.
        first: A model's name.
        second: Another's.
        outcome: 1 where the first wins, 1/2 for a tie, 0 where the second wins.
    """

    prompt: int
    first: str
    second: str
    outcome: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """Models by strength: the first wins against the second with probability sigma(difference of strengths).

    Attributes:
        strengths: By model, best first, with intervals; their mean is 0.
        intervals: Whether the intervals mean anything: without, too many resamples had no finite fit.
        left_out: Resamples without a finite fit.
        prior_std: Standard deviation of the normal prior of each strength; None: plain maximum likelihood.
    """

    strengths: dict[str, Estimate]
    intervals: bool
    left_out: int
    prior_std: float | None


def rank(
    comparisons: Sequence[Comparison], prior_std: float | None = None, seed: int = 0, resamples: int = 500
) -> Ranking:
    """Bradley-Terry strengths by maximum likelihood, ties as half a win each, with percentile bootstrap intervals.

    Args:
        comparisons: At least one; resampled by prompt.
        prior_std: See `bradley_terry`.
        seed: Of the resampling.
        resamples: How many.

    Raises:
        ComparisonError: See `bradley_terry`.
    """
    names = sorted({name for each in comparisons for name in (each.first, each.second)})
    number = {name: index for index, name in enumerate(names)}
    prompts = {prompt: row for row, prompt in enumerate(sorted({each.prompt for each in comparisons}))}
    wins = np.zeros((len(prompts), len(names), len(names)))
    for each in comparisons:
        row, first, second = prompts[each.prompt], number[each.first], number[each.second]
        wins[row, first, second] += each.outcome
        wins[row, second, first] += 1 - each.outcome
    fitted = bradley_terry(names, wins.sum(0), prior_std)
    rng, drawn, left_out = np.random.default_rng(seed), list[np.ndarray](), 0
    for _ in range(resamples):
        counts = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)))
        try:
            drawn.append(bradley_terry(names, np.tensordot(counts, wins, 1), prior_std))
        except ComparisonError:
            left_out += 1
    shown = left_out <= MOST_LEFT_OUT * resamples
    low, high = np.quantile(drawn, _tails(), axis=0) if shown else np.full((2, len(names)), np.nan)
    order = np.argsort(-fitted, kind="stable")
    met = (wins + wins.transpose(0, 2, 1)).sum((0, 2))
    strengths = {
        names[each]: Estimate(float(fitted[each]), float(low[each]), float(high[each]), int(met[each]))
        for each in order
    }
    return Ranking(strengths, shown, left_out, prior_std)


def bradley_terry(names: Sequence[str], wins: np.ndarray, prior_std: float | None = None) -> np.ndarray:
    """Strengths by maximum likelihood, or the most probable ones under a normal prior.

    Args:
        names: Of the models.
        wins: Shape (K, K): how often the row's model won against the column's; half a win each for a tie.
        prior_std: Standard deviation of a normal prior, with mean 0, of each strength; None: none.

    Returns:
        Shape (K,), with mean 0.

    Raises:
        ComparisonError: Without a prior: the likelihood has no finite maximum, since the models are in groups of which
            one never won against the rest (the graph of wins is not strongly connected).
    """
    wins = np.asarray(wins, np.float64) * (1 - np.eye(len(names)))
    if prior_std is None:
        _check_connected(names, wins)
    precision = 0.0 if prior_std is None else prior_std**-2
    met, won = wins + wins.T, wins.sum(1)

    def loss(found: np.ndarray) -> float:
        return float(precision * found @ found / 2 - (wins * log_expit(found[:, None] - found)).sum())

    def gradient(found: np.ndarray) -> np.ndarray:
        return np.asarray(precision * found - won + (met * expit(found[:, None] - found)).sum(1))

    def hessian(found: np.ndarray) -> np.ndarray:
        chance = expit(found[:, None] - found)
        each = met * chance * (1 - chance)
        # The likelihood does not change with the strengths' mean: the last term fixes it at 0.
        return np.asarray(np.diag(each.sum(1) + precision) - each + np.ones_like(each))

    found = _newton(loss, gradient, hessian, np.zeros(len(names)))
    return found - found.mean()


def _newton(
    loss: Callable[[np.ndarray], float],
    gradient: Callable[[np.ndarray], np.ndarray],
    hessian: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
) -> np.ndarray:
    """Where a convex function is least."""
    return np.asarray(minimize(loss, start, jac=gradient, hess=hessian, method="trust-exact", options={"gtol": 1e-9}).x)


def _check_connected(names: Sequence[str], wins: np.ndarray) -> None:
    """Raises ComparisonError where a model or a group of them is never beaten, or never wins, or stands apart."""
    prior = "; or fit with a prior, which draws all strengths together (evaluation.prior_std: 1.0)"
    parts, part = connected_components(wins, directed=True, connection="weak")
    if parts > 1:
        groups = " and ".join(_listed(names, part == number) for number in range(parts))
        raise ComparisonError(f"{groups} were never compared with each other: compare some of them{prior}")
    groups, group = connected_components(wins, directed=True, connection="strong")
    if groups == 1:
        return
    # Of two groups the one says all about the other: the smaller is the shorter to name.
    shown = [int(np.bincount(group).argmin())] if groups == 2 else range(groups)
    said = dict[str, list[str]](lost=[], won=[])
    for number in shown:
        inside = group == number
        name = f"{_listed(names, inside)} {'has' if inside.sum() == 1 else 'have'}"
        if not wins[~inside][:, inside].any():
            said["lost"].append(f"{name} never lost against another")
        elif not wins[inside][:, ~inside].any():
            said["won"].append(f"{name} never won against another")
    reasons = "; ".join([*said["lost"], *said["won"]])
    raise ComparisonError(
        f"{reasons}: the likelihood has no finite maximum. Compare more answers, leave them out{prior}"
    )


def _listed(names: Sequence[str], which: np.ndarray) -> str:
    return ", ".join(name for name, one in zip(names, which, strict=True) if one)


def _tails() -> list[float]:
    return [0.5 - LEVEL / 2, 0.5 + LEVEL / 2]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Whether pairs that the model is sure of are those that it gets right.

    Attributes:
        error: Expected calibration error: by how much confidence and accuracy of a bin differ, over all pairs.
        bins: By confidence, those that have pairs: lower and upper edge, pairs, mean confidence, accuracy.
    """

    error: float
    bins: list[Mapping[str, float]]


def calibration(margins: np.ndarray) -> Calibration:
    """How well sigma(margin), the probability that a pair's chosen answer is preferred, says how often it is.

    Which answer was chosen must not be known beforehand: the model is for the answer with the higher reward, with
    confidence sigma(|margin|), and right where that is the chosen one. A margin of 0 is right by half.

    Args:
        margins: Shape (N,): of the implicit reward, N > 0.
    """
    confidence, right = expit(np.abs(margins)), (np.sign(margins) + 1) / 2
    edges = np.linspace(0.5, 1.0, CALIBRATION_BINS + 1)
    of_bin = np.minimum(np.searchsorted(edges, confidence, side="right") - 1, CALIBRATION_BINS - 1)
    bins, error = list[Mapping[str, float]](), 0.0
    for number in range(CALIBRATION_BINS):
        if not (inside := of_bin == number).any():
            continue
        sure, accuracy = float(confidence[inside].mean()), float(right[inside].mean())
        error += abs(sure - accuracy) * inside.sum() / len(margins)
        each = {"from": float(edges[number]), "to": float(edges[number + 1]), "pairs": int(inside.sum())}
        bins.append({**each, "confidence": sure, "accuracy": accuracy})
    return Calibration(float(error), bins)
