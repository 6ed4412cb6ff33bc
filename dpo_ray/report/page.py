"""From facts to one HTML file that needs nothing else: no script, no font, no request.

All that comes from a run (names, reasons, error messages, configuration) is text of others: the templates escape it,
the page's own policy forbids scripts, and nothing here marks a string as safe.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from dpo_ray import storage
from dpo_ray.config import leaves
from dpo_ray.errors import ConfigError
from dpo_ray.pairs.statistics import PERCENTILES, Statistics, bars
from dpo_ray.pairs.store import COUNTS
from dpo_ray.redaction import shown
from dpo_ray.report.answers import marked
from dpo_ray.report.charts import Chart, Series, Spot, Tick, frontier_chart, line_chart, number, ticks
from dpo_ray.report.facts import Facts, HeldOut, SideBySide, eval_prefixes, read_facts, step_parts

FILE_NAME = "report.html"
# Of a prompt or an answer; of a histogram of lengths.
SHOWN_CHARS, LENGTH_BINS = 3000, 40
# A run may have thousands of attempts: how many a chart marks, how many lists and the time axis have, the newest, and
# how much of a reason is told wherever one points at it.
SHOWN_MARKS, SHOWN_NEWEST, MARK_CHARS = 100, 500, 100
# Of the page's colours; more curves than that share them.
SLOTS = 8
NAMES = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "reward margin",
    "loss": "loss",
    "logps/chosen": "chosen log-probability",
    "logps/rejected": "rejected log-probability",
}
VERDICTS = {1.0: "the first one's is better", 0.5: "a tie", 0.0: "the second one's is better", None: "no verdict"}
# What several runs are compared by: metric of a step, title, unit, and whether held-out pairs have it too.
COMPARED = (
    ("loss", "Loss", "", True),
    ("rewards/margins", "Reward margin", "nats", True),
    ("rewards/accuracies", "Accuracy", "share of pairs", True),
    ("logps/chosen", "Chosen log-probability", "nats per answer", True),
    ("logps/rejected", "Rejected log-probability", "nats per answer", True),
    ("grad_norm", "Gradient norm before clipping", "", False),
    ("learning_rate", "Learning rate", "", False),
    ("perf/pairs_per_s", "Throughput", "pairs/s", False),
)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the steps' time: its name, colour, share in percent, and text."""

    name: str
    slot: int
    percent: float
    text: str


@dataclass(frozen=True, slots=True)
class Bar:
    """An attempt on the time axis, in percent of the whole: where it began, how long it lasted, and what it was;
    and where faults fell that did not end it.
    """

    attempt: int
    left: float
    width: float
    text: str
    faults: tuple[tuple[float, str], ...]


def write_report(run_uri: str) -> str:
    """Writes `<run>/report.html`, and says where it is.

    Raises:
        ConfigError: There is no run.
        StorageError: The run cannot be read, or the page not be written.
    """
    place = storage.join(run_uri, FILE_NAME)
    storage.write_bytes(place, run_page(read_facts(run_uri)).encode())
    return place


def write_comparison(run_uris: Sequence[str], output: str) -> None:
    """Writes one page of several runs.

    Args:
        run_uris: Their folders.
        output: Where the page goes.

    Raises:
        ConfigError: One of them is no run, or there are fewer than two.
        StorageError: A run cannot be read, or the page not be written.
    """
    if len(run_uris) < 2:
        raise ConfigError("dpo-ray report --compare: give two runs or more")
    page = comparison_page([read_facts(run_uri) for run_uri in run_uris])
    storage.write_bytes(output, page.encode())


def write_data_page(statistics: Statistics, output: str) -> None:
    """Writes a page of what a pair store holds.

    Args:
        statistics: See `statistics.describe`.
        output: Where the page goes.

    Raises:
        StorageError: It cannot be written.
    """
    page = _template("data.html.jinja").render(
        title="Preference pairs",
        statistics=statistics,
        counts=_counts(statistics.counts, None),
        charts=_data_charts(statistics),
        percentiles=PERCENTILES,
    )
    storage.write_bytes(output, page.encode())


def run_page(facts: Facts) -> str:
    """The page of one run."""
    about, objective = facts.about, facts.config.get("objective", {})
    parts, timeline, time_ticks = _parts(facts), *_timeline(facts)
    return _template("run.html.jinja").render(
        facts=facts,
        title=facts.name,
        figures=_figures(facts),
        loss=_loss_name(objective),
        parts=parts,
        charts=_charts(facts),
        calibration=_calibration(facts.evaluation),
        side_by_side=[_answers(each) for each in facts.side_by_side],
        verdicts=VERDICTS,
        data_charts=_data_charts(facts.data.statistics) if facts.data else [],
        most_marks=SHOWN_MARKS,
        newest=SHOWN_NEWEST,
        bars=timeline,
        time_ticks=time_ticks,
        counts=_counts(facts.data.counts, facts.data.tokens) if facts.data else [],
        percentiles=PERCENTILES,
        configuration=shown(yaml.safe_dump(facts.config, sort_keys=False, allow_unicode=True)) if facts.config else "",
        versions=about.get("versions") or {},
        revision=about.get("revision"),
        code=about.get("code") or {},
    )


def comparison_page(runs: Sequence[Facts]) -> str:
    """The page of several runs."""
    names = _distinct_names(runs)
    charts = list[Chart | None]()
    for metric, title, unit, held_out in COMPARED:
        series = [
            Series(name, slot % SLOTS, each.steps.step, each.steps.get(metric))
            for slot, (name, each) in enumerate(zip(names, runs, strict=True))
        ]
        for one, each in zip(series[:], runs, strict=True) if held_out else ():
            values = each.evaluations.get(f"eval_{metric}")
            series.append(Series(f"{one.name}, held-out", one.slot, each.evaluations.step, values, dots=True))
        charts.append(line_chart(title, unit, series, cut=metric == "grad_norm"))
    return _template("compare.html.jinja").render(
        title=f"{len(runs)} runs compared",
        rows=[(name, each, dict(_figures(each))) for name, each in zip(names, runs, strict=True)],
        columns=list(dict.fromkeys(name for each in runs for name, _ in _figures(each))),
        frontiers=_frontiers(names, runs),
        charts=[chart for chart in charts if chart is not None],
        run_names=names,
        differing=_differing([each.config for each in runs]),
    )


def _frontiers(names: Sequence[str], runs: Sequence[Facts]) -> list[Chart]:
    """What the runs have gained, by their distance from the reference; none of fewer than two."""
    known = [
        (name, slot % SLOTS, each.evaluated)
        for slot, (name, each) in enumerate(zip(names, runs, strict=True))
        if each.evaluated is not None
    ]
    if len(known) < 2:
        return []
    along = "KL to the reference, nats"
    accuracy = [Spot(name, slot, each.kl, each.accuracy) for name, slot, each in known]
    margin = [Spot(name, slot, each.kl, each.margin) for name, slot, each in known]
    return [
        frontier_chart("Accuracy", "share of pairs", along, accuracy),
        frontier_chart("Margin of log-ratios", "nats", along, margin),
    ]


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, left = divmod(int(seconds), 60)
    return f"{minutes} min {left} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def _template(name: str) -> Any:
    environment = Environment(
        loader=PackageLoader("dpo_ray.report"),
        autoescape=True,  # Of every template, whatever its name.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "metric": _metric,
        "duration": duration,
        "moment": _moment,
        "clipped": _clipped,
        "shown": shown,
    }
    environment.globals |= {
        "version": importlib.metadata.version("dpo_ray"),
        "written": datetime.datetime.now(datetime.UTC),
        "names": NAMES,
    }
    return environment.get_template(name)


def _number(value: float | None) -> str:
    return "–" if value is None else number(value)


def _metric(value: float | None, metric: str) -> str:
    if value is None or metric != "rewards/accuracies":
        return _number(value)
    return f"{100 * value:.1f} %"


def _moment(when: datetime.datetime | None) -> str:
    return "–" if when is None else f"{when.astimezone(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"


def _loss_name(objective: Mapping[str, Any]) -> str:
    loss = objective.get("loss", "")
    return " + ".join(f"{share:g} {name}" for name, share in loss.items()) if isinstance(loss, dict) else str(loss)


def _figures(facts: Facts) -> list[tuple[str, str]]:
    """The numbers one looks at first."""
    of = f" of {facts.total_steps:,}" if facts.total_steps is not None else ""
    found = [("steps", f"{facts.num_steps:,}{of}")]
    for held in facts.held_out[:1]:
        for metric in ("rewards/accuracies", "rewards/margins", "loss"):
            if metric in held.rows:
                found.append((f"held-out {NAMES[metric]}", _before_after(held, metric)))
    if not facts.held_out and len(facts.steps):
        for metric in ("rewards/accuracies", "rewards/margins", "loss"):
            last = facts.steps.at(metric, -1)
            if last is not None:
                found.append((f"{NAMES[metric]}, last step", _metric(last, metric)))
    if facts.chosen is not None:
        before, after = number(facts.chosen.before), number(facts.chosen.after)
        found.append(("chosen log-probability", f"{before} → {after}"))
    current = facts.evaluation if facts.evaluation.get("step") == facts.num_steps else {}
    for name, each in (current.get("answers") or {}).get("win_rates", {}).items():
        rate, low, high = (100 * each["rate"][end] for end in ("value", "low", "high"))
        found.append((f"win rate against {name}", f"{rate:.1f} % ({low:.1f} to {high:.1f})"))
    if facts.evaluated is not None:
        found.append(("KL to the reference", str(facts.evaluated.kl)))
    if facts.pairs_trained:
        found.append(("pairs trained on", f"{facts.pairs_trained:,}"))
    if facts.steps_s:
        found.append(("time of all steps", duration(facts.steps_s)))
    if facts.wall_s is not None:
        found.append(("time from first start to end", duration(facts.wall_s)))
    if facts.pairs_per_s is not None:
        found.append(("pairs/s", number(facts.pairs_per_s)))
    return found


def _before_after(held: HeldOut, metric: str) -> str:
    before, first, last = held.rows[metric]
    if before is None and held.first_step < held.last_step:
        before = first
    return _metric(last, metric) if before is None else f"{_metric(before, metric)} → {_metric(last, metric)}"


def _charts(facts: Facts) -> list[Chart]:
    again = facts.attempts[1:]
    if len(again) > SHOWN_MARKS:
        again = tuple(again[len(again) * number // SHOWN_MARKS - 1] for number in range(1, SHOWN_MARKS + 1))
    marks = [
        (
            each.position,
            f"attempt {each.attempt} began after step {each.position:,}: {_clipped(each.reason, MARK_CHARS)}",
        )
        for each in again
    ]
    steps = facts.steps.step

    def training(name: str, slot: int, metric: str) -> Series:
        return Series(name, slot, steps, facts.steps.get(metric))

    def both(title: str, unit: str, *metrics: tuple[str, str]) -> Chart | None:
        series = [
            training(f"{name}, training" if name else "training", slot, metric)
            for slot, (name, metric) in enumerate(metrics)
        ]
        for held, prefix in eval_prefixes(facts.evaluations.values).items():
            called = f"held-out {held}".strip()
            # Sets that have names are told apart by colour, where there is one metric alone.
            offset = 0 if len(metrics) > 1 or not held else len(series)
            series += [
                Series(
                    f"{name}, {called}" if name else called,
                    (slot + offset) % SLOTS,
                    facts.evaluations.step,
                    facts.evaluations.get(f"{prefix}{metric}"),
                    dots=True,
                )
                for slot, (name, metric) in enumerate(metrics)
                if len(metrics) == 1 or not held
            ]
        return line_chart(title, unit, series, marks)

    seconds = [Series(name, slot, steps, each) for slot, (name, each) in enumerate(step_parts(facts).items())]
    memory = [name for name in facts.steps.values if "memory" in name]
    found = [
        both("Loss", "", ("", "loss")),
        both("Reward margin", "nats", ("", "rewards/margins")),
        both("Accuracy", "share of pairs", ("", "rewards/accuracies")),
        both("Log-probabilities", "nats per answer", ("chosen", "logps/chosen"), ("rejected", "logps/rejected")),
        line_chart("Learning rate", "", [training("learning rate", 0, "learning_rate")], marks),
        line_chart("Gradient norm before clipping", "", [training("norm", 0, "grad_norm")], marks, cut=True),
        line_chart("Throughput", "pairs/s", [training("pairs/s", 0, "perf/pairs_per_s")], marks),
        line_chart("Seconds of a step, by parts", "s", seconds, marks, cut=True),
        line_chart("Memory", "", [training(name, slot % SLOTS, name) for slot, name in enumerate(memory)], marks),
    ]
    return [chart for chart in found if chart is not None]


def _parts(facts: Facts) -> list[Part]:
    """Where the time of all steps went."""
    sums = {name: float(np.sum(each)) for name, each in step_parts(facts).items()}
    total = sum(sums.values())
    return [
        Part(name, slot, round(100 * each / total, 2), f"{duration(each)}, {each / total:.1%}")
        for slot, (name, each) in enumerate(sums.items())
    ]


def _timeline(facts: Facts) -> tuple[list[Bar], list[Tick]]:
    """Attempts and faults on the time axis, and its marks; at in percent."""
    known = [each for each in facts.attempts[-SHOWN_NEWEST:] if each.began is not None]
    ended = facts.status.ended
    if not known:
        return [], []
    starts = [each.began.timestamp() for each in known if each.began is not None]
    # A driver that was killed did not say when: its last group lasted at least as long as its steps that are left.
    stops = [
        start + each.steps_s if following.generation > each.generation else stop
        for each, following, start, stop in zip(known, known[1:], starts, starts[1:], strict=False)
    ]
    stops.append(max(starts[-1], ended.timestamp()) if ended is not None else starts[-1] + known[-1].steps_s)
    total = max(1.0, stops[-1] - starts[0])
    faults = [
        (when.timestamp(), _clipped(reason, MARK_CHARS))
        for when, reason in facts.faults[-SHOWN_NEWEST:]
        if when is not None
    ]
    # Replicas may be lost before the first group began, and after one has ended.
    earliest = -math.inf if len(facts.attempts) <= SHOWN_NEWEST else starts[0]
    since, until = [earliest, *starts[1:]], [*starts[1:], math.inf]
    bars = [
        Bar(
            each.attempt,
            round(100 * (start - starts[0]) / total, 2),
            round(max(0.4, 100 * (stop - start) / total), 2),
            f"attempt {each.attempt}, {duration(stop - start)}, {each.steps:,} steps: "
            f"{_clipped(each.reason, MARK_CHARS)}",
            tuple(
                (round(min(100.0, max(0.0, 100 * (when - starts[0]) / total)), 2), reason)
                for when, reason in faults
                if first <= when < last
            ),
        )
        for each, start, stop, first, last in zip(known, starts, stops, since, until, strict=True)
    ]
    units = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))
    unit_s, unit = next((each for each in units if total >= 2 * each[0]), (1.0, "s"))
    marks = [each for each in ticks(0.0, total / unit_s, 4) if each * unit_s <= total]
    return bars, [Tick(round(100 * each * unit_s / total, 2), f"{number(each)} {unit}") for each in marks]


def _counts(counts: Mapping[str, int], tokens: int | None) -> list[tuple[str, str]]:
    """What became of the rows."""
    names = {"pairs": "pairs to train on", "eval_pairs": "held-out pairs"}
    found = [
        (names.get(name, name.replace("_", " ")), f"{counts[name]:,}")
        for name in COUNTS
        if counts.get(name) or (name in counts and name in ("rows", "pairs", "rejects"))
    ]
    if tokens is not None:
        found.append(("tokens (prompts once per pair)", f"{tokens:,}"))
    return found


def _data_charts(statistics: Statistics | None) -> list[Chart]:
    """Histograms of lengths, in shares of each."""
    if statistics is None:
        return []
    longest = max(len(each.histogram) for each in statistics.lengths.values())
    found = list[Series]()
    for slot, (name, each) in enumerate(statistics.lengths.items()):
        bins = bars([*each.histogram, *[0] * (longest - len(each.histogram))], LENGTH_BINS)
        total = sum(num for *_, num in bins)
        share = np.array([100 * num / total for *_, num in bins])
        found.append(Series(name, slot, np.array([(first + last) // 2 for first, last, _ in bins]), share))
    width = -(-longest // LENGTH_BINS)
    unit = "% in each token" if width == 1 else f"% in each {width:,} tokens"
    chart = line_chart("Lengths", unit, found, x_name="tokens")
    return [chart] if chart else []


def _calibration(evaluation: Mapping[str, Any]) -> Chart | None:
    """Accuracy by confidence."""
    bins = evaluation["held_out"]["calibration"]["bins"] if evaluation else []
    sure, right = (np.array([100 * each[name] for each in bins]) for name in ("confidence", "accuracy"))
    even = np.array([50.0, 100.0])
    series = [Series("held-out pairs", 0, sure, right, dots=True), Series("as often as it is sure", 7, even, even)]
    return line_chart("Calibration", "% right", series, x_name="confidence, %", first=50) if bins else None


def _answers(each: SideBySide) -> dict[str, Any]:
    """Answers in stretches, those of the first two models compared."""
    texts = {name: _clipped(text) for name, text in each.answers.items()}
    one, two, *_ = texts
    stretches = {name: [(text, False)] for name, text in texts.items()}
    stretches |= {one: marked(texts[one], texts[two]), two: marked(texts[two], texts[one])}
    turns = list[tuple[str, str]]()
    room = SHOWN_CHARS
    # The last turn is what is answered.
    for turn in reversed(each.prompt):
        if room <= 0:
            break
        content = turn.get("content") or ""
        turns.insert(0, (turn["role"], _clipped(content, room)))
        room -= len(turn["role"]) + len(content)
    left_out = len(each.prompt) - len(turns)
    return {"turns": turns, "left_out": left_out, "answers": stretches, "outcomes": each.outcomes}


def _clipped(text: str, most: int = SHOWN_CHARS) -> str:
    left = len(text) - most
    return text if left <= 0 else f"{text[:most]} … ({left:,} characters more)"


def _distinct_names(runs: Iterable[Facts]) -> list[str]:
    """The runs' names; their folders where names are the same."""
    runs = list(runs)
    names = [each.name for each in runs]
    return [name if names.count(name) == 1 else shown(each.run_uri) for name, each in zip(names, runs, strict=True)]


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Keys of the configuration that are not the same in all runs, with their values."""
    flat = [dict(leaves(each)) for each in configs]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    values = {key: [shown(str(each.get(key, "–"))) for each in flat] for key in keys}
    return [(key, each) for key, each in values.items() if len(set(each)) > 1]
