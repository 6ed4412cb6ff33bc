"""`dpo-ray sweep`: a run for each combination of some settings, all on the same pairs and the same reference scores.

Each is a run like any other, with a name of its own: given again, finished ones are looked at, the others go on. Two
more things may be asked for: to evaluate what was trained, which says what a run's distance from the reference has
bought, and to stop runs that are behind those before them.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

from dpo_ray import storage
from dpo_ray.config import Config, load_config, read_yaml
from dpo_ray.errors import (
    ActorsLostError,
    ConfigError,
    FirstStepError,
    JudgeError,
    NonFiniteLossError,
    RecoveryError,
    ReferenceFillError,
    StoppedError,
    first_line,
)
from dpo_ray.evaluation.judge import EndpointJudge
from dpo_ray.orchestration import evaluate_job
from dpo_ray.orchestration.benchmarks_job import check_benchmarks
from dpo_ray.orchestration.early_stop import Behind, Race, check_metric, read_stopped, write_stopped
from dpo_ray.orchestration.stop import Stop
from dpo_ray.orchestration.trainer import Result, cpus_wanted, finished_run, start_ray, train
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.report.charts import on_frontier
from dpo_ray.report.facts import Evaluated, evaluated_of
from dpo_ray.report.page import write_comparison


@dataclass(frozen=True, slots=True)
class Point:
    """A combination of settings.

    Attributes:
        values: By key.
        config: The run.
        sweep: The name that the sweep was given.
    """

    values: dict[str, Any]
    config: Config
    sweep: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        point: Which.
        result: None where it failed or was stopped.
        error: Why it failed, or was not evaluated, in a line.
        stopped: Why it was stopped.
        evaluated: What `dpo-ray evaluate` found; None where it was not asked for, or there is no model.
    """

    point: Point
    result: Result | None
    error: str | None = None
    stopped: Behind | None = None
    evaluated: Evaluated | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last evaluation, without prefix; of the last step in a run without evaluations."""
        last = self.stopped.metrics if self.stopped else self.result.eval_metrics if self.result else {}
        evaluation = {key.removeprefix("eval_"): value for key, value in last.items()}
        return evaluation or (self.result.metrics if self.result else {})

    def log_ratios(self, of: str) -> float | None:
        """Mean of log pi / pi_ref, summed over tokens, of "chosen" or "rejected" answers, or of their "margins"."""
        reward = self.metrics.get(f"rewards/{of}")
        return None if reward is None else reward / self.point.config.objective.beta


def points(path: str, grid: Sequence[str], overrides: Sequence[str] = ()) -> list[Point]:
    """All combinations, the last key's values varying fastest.

    Args:
        path: A YAML file, the run that all vary.
        grid: Each `section.key=[value, ...]`, in YAML.
        overrides: Each `section.key=value`, for all of them.

    Raises:
        ConfigError: One of them does not describe a run, or two would have one name.
    """
    axes = [_axis(each) for each in grid]
    keys = [key for key, _ in axes]
    if len(set(keys)) < len(keys):
        raise ConfigError(f"--grid names {next(key for key in keys if keys.count(key) > 1)} twice: give it one list")
    base = load_config(path, list(overrides))
    if base.sft.epochs:
        raise ConfigError(
            "sft.epochs is set: each run of a sweep would have a start of its own; run `dpo-ray sft` once, set "
            f"model.path to {base.start().run_uri}/export, and sft.epochs: null"
        )
    found = []
    for values in itertools.product(*(values for _, values in axes)):
        chosen = dict(zip(keys, values, strict=True))
        name = "-".join([base.name, *(f"{_short(key, keys)}-{_slug(value)}" for key, value in chosen.items())])
        settings = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
        config = load_config(path, [*overrides, *settings, f"name={json.dumps(name)}"])
        found.append(Point(chosen, config, base.name))
    names = [point.config.name for point in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"--grid: two combinations would both be called {max(names, key=names.count)}: leave one out")
    return found


def sweep(
    found: Sequence[Point],
    watcher: Watcher | None = None,
    evaluated: bool = False,
    stop_early: str | None = None,
) -> Iterator[Outcome]:
    """Trains one after the other; what fails by its own settings does not keep the others from it.

    Args:
        found: See `points`.
        watcher: Told what happens; None for silence.
        evaluated: Whether each model is evaluated too (see `evaluate_job`).
        stop_early: The metric by which runs are stopped that are behind those before them (see `early_stop`); None:
            none is, and those go on that were.

    Raises:
        UserError: What would fail for all of them.
    """
    watcher = watcher or Watcher()
    if stop_early is not None:
        check_metric(stop_early, found[0].values, [point.config for point in found])
    # One for all, for `evaluation.max_requests` and `max_tokens` are a command's.
    judge = _check_evaluation([point.config for point in found]) if evaluated else None
    if any(finished_run(point.config) is None for point in found):
        # Ray on this machine shall have room for the largest.
        start_ray(max((point.config for point in found), key=cpus_wanted))
    for number, point in enumerate(found):
        watcher.phase(f"run {number + 1} of {len(found)}: {point.config.name}")
        before = [each.config.run_uri for each in found[:number]]
        outcome = _outcome(point, before, stop_early, watcher)
        if evaluated and outcome.result is not None:
            try:
                outcome = replace(outcome, evaluated=_evaluate(point.config, outcome.result.steps, judge, watcher))
            except (JudgeError, ReferenceFillError, ActorsLostError) as error:
                # Models take longer to train than to evaluate: `dpo-ray evaluate` can be given again.
                watcher.warning(f"{point.config.name} is trained, but not evaluated: {error}")
                outcome = replace(outcome, error=f"not evaluated: {first_line(error)}")
        yield outcome


def frontiers(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """For each run by what no other one beats it: "accuracy" or "margin", more of it at as little KL or less."""
    marks: list[list[str]] = [[] for _ in outcomes]
    known = [(place, each.evaluated) for place, each in enumerate(outcomes) if each.evaluated is not None]
    for gain in ("accuracy", "margin"):
        flags = on_frontier([each.kl.value for _, each in known], [getattr(each, gain).value for _, each in known])
        for (place, _), flag in zip(known, flags, strict=True):
            marks[place] += [gain] if flag else []
    return marks


def as_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The outcomes as plain data."""
    return [
        {
            "run": each.point.config.run_uri,
            "settings": each.point.values,
            "metrics": each.metrics,
            "error": each.error,
            "stopped": asdict(each.stopped) if each.stopped else None,
            "evaluated": asdict(each.evaluated) if each.evaluated else None,
            "frontier": marks,
        }
        for each, marks in zip(outcomes, frontiers(outcomes), strict=True)
    ]


def write_page(found: Sequence[Point]) -> str | None:
    """Writes a page that compares the runs beside their folders; returns where, or None for a single run."""
    if len(found) < 2:
        return None
    place = storage.join(found[0].config.storage_path, f"{found[0].sweep}-sweep.html")
    write_comparison([point.config.run_uri for point in found], place)
    return place


def _outcome(point: Point, before: Sequence[str], stop_early: str | None, watcher: Watcher) -> Outcome:
    """Trains a run, as far as it goes."""
    config, race, stop = point.config, None, None
    if stop_early is not None and finished_run(config, evaluated=False) is None:
        if lost := read_stopped(config.run_uri):
            watcher.phase(f"{config.run_uri} was stopped {lost.reason}")
            return Outcome(point, None, stopped=lost)
        race = Race(stop_early, config, before)
        stop = Stop(race.hear)
        if reason := race.hear_recorded():
            stop.ask(reason)
    try:
        return Outcome(point, train(config, watcher, stop))
    except (NonFiniteLossError, FirstStepError, RecoveryError) as error:
        watcher.warning(f"{config.name}: {error}")
        return Outcome(point, None, first_line(error))
    except StoppedError as error:
        if error.signal:
            raise
        if race is None or race.lost is None:
            return Outcome(point, None, first_line(error))  # By a tracker of its own.
        write_stopped(config.run_uri, race.lost)
        return Outcome(point, None, stopped=race.lost)


def _check_evaluation(configs: Sequence[Config]) -> EndpointJudge | None:
    """Refuses what would be known only when the first run has been trained; returns the judge, if there is one.

    Raises:
        ConfigError: Nothing is held out, there will be no whole model, or no KL; or judge or benchmarks lack something.
    """
    for config in configs:
        options = config.evaluation
        if options != configs[0].evaluation:
            raise ConfigError("--grid: with --evaluate all runs are evaluated alike: leave keys of evaluation out")
        if not config.data.eval and not config.data.eval_fraction:
            raise ConfigError("--evaluate: nothing is held out: set data.eval or data.eval_fraction")
        if not config.adapter.merge:
            raise ConfigError(
                "--evaluate: with adapter.merge: false the export is an adapter alone, and a whole model is evaluated: "
                "set adapter.merge: true"
            )
        if not options.prompts or (options.temperature, options.top_p) != (1.0, 1.0):
            raise ConfigError(
                "--evaluate: the KL is estimated on answers drawn from the policy as it is: set evaluation.prompts "
                "above 0, and evaluation.temperature and evaluation.top_p to 1"
            )
        if config.adapter.quantize and config.train.eval_every_steps is None:
            raise ConfigError(
                "--evaluate: with adapter.quantize held-out pairs have scores of the reference only where training "
                "evaluates them: set train.eval_every_steps"
            )
        check_benchmarks(config)
    return evaluate_job.judge_of(configs[0])


def _evaluate(config: Config, step: int, judge: EndpointJudge | None, watcher: Watcher) -> Evaluated | None:
    watcher.phase(f"evaluating {config.name}")
    # A run that was finished before has the options on record that it was trained with.
    options = [f"evaluation={config.evaluation.model_dump_json()}"]
    found = evaluate_job.evaluate(config.run_uri, options, watcher, judge)
    return evaluated_of(evaluate_job.as_json(found), config.objective.beta, step)


def _axis(text: str) -> tuple[str, list[Any]]:
    key, separator, value = text.partition("=")
    try:
        values = read_yaml(value)
        json.dumps(values)
    except (yaml.YAMLError, TypeError):  # YAML has dates, which no key takes.
        values = None
    if not separator or not key or not isinstance(values, list) or not values:
        raise ConfigError(f"--grid {text!r}: write section.key=[value, value, ...]")
    if key == "name":
        raise ConfigError("--grid name: each run of a sweep gets a name by its settings; leave it out")
    return key, values


def _short(key: str, keys: Sequence[str]) -> str:
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _slug(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", value if isinstance(value, str) else json.dumps(value)).strip("_")
