"""A run of a sweep that is clearly behind those before it ends early: Ray Tune's median stopping rule.

Runs of a sweep come one after the other, so that the rule is given series of (step, metric) and nothing of Tune's own
runs. What it decides follows from `metrics.jsonl` alone: a sweep that is given again decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ray.tune.schedulers import MedianStoppingRule, TrialScheduler

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.errors import ConfigError
from dpo_ray.orchestration.trainer import planned_steps

# Metrics of an evaluation, and which end is the better one.
METRICS = {"eval_loss": "min", "eval_rewards/accuracies": "max", "eval_rewards/margins": "max"}
# Of fewer runs a median says little.
LEAST_RUNS = 3


@dataclass(frozen=True, slots=True)
class Behind:
    """Why a sweep has stopped a run, as `<run>/stopped_early.json` has it.

    Attributes:
        step: Of the evaluation that decided it.
        reason: In a line.
        metrics: Of that evaluation.
    """

    step: int
    reason: str
    metrics: dict[str, float]


class _Trial(NamedTuple):
    """What the rule wants of one of Tune's."""

    trial_id: str


def check_metric(metric: str, keys: Iterable[str], configs: Iterable[Config]) -> None:
    """Refuses a metric by which the runs of a sweep cannot be compared.

    Args:
        metric: What `--stop-early` names.
        keys: Those that the sweep varies.
        configs: Its runs.

    Raises:
        ConfigError: It is not measured in all of them, or does not mean the same in all of them.
    """
    if metric not in METRICS:
        raise ConfigError(f"--stop-early {metric}: runs can be compared by {', '.join(METRICS)}")
    apart = {"eval_loss": "objective.", "eval_rewards/margins": "objective.beta"}.get(metric)
    if apart and (key := next((key for key in keys if key.startswith(apart)), None)):
        raise ConfigError(
            f"--stop-early {metric}: with a grid over {key} it is not the same measure in all runs; use "
            "eval_rewards/accuracies"
        )
    for config in configs:
        if not config.train.eval_every_steps:
            raise ConfigError("--stop-early: nothing is evaluated during training: set train.eval_every_steps")
        if metric != "eval_loss" and not config.needs_reference:
            raise ConfigError(
                f"--stop-early {metric}: objective.loss: {config.objective.name} has no reference and so no rewards; "
                "use eval_loss"
            )


def is_behind(metric: str, own: Mapping[int, float], others: Sequence[Mapping[int, float]]) -> bool:
    """Whether a run's best value so far is worse than the median of what others were like on average up to that step.

    Not before its second evaluation, and not against fewer than `LEAST_RUNS` others that came so far.

    Args:
        metric: One of `METRICS`.
        own: Its values by step, the last one being the step at which it is asked.
        others: Those of other runs.

    Source: Golovin et al., Google Vizier, KDD 2017, section 3.2.
    """
    steps = sorted(own)
    if len(steps) < 2:
        return False
    # Without a controller of Tune's there is no run to make way for: a slice of time that never ends.
    rule: Any = MedianStoppingRule(
        time_attr="step",
        metric="value",
        mode=METRICS[metric],
        grace_period=steps[1],
        min_samples_required=LEAST_RUNS,
        min_time_slice=math.inf,
    )
    *series, this = [_Trial(str(number)) for number in range(len(others) + 1)]
    for trial, values in zip((*series, this), (*others, {step: own[step] for step in steps[:-1]}), strict=True):
        for step in sorted(values):
            rule.on_trial_complete(None, trial, {"step": step, "value": values[step]})
    decided = rule.on_trial_result(None, this, {"step": steps[-1], "value": own[steps[-1]]})
    return bool(decided == TrialScheduler.STOP)


class Race:
    """A run of a sweep against those before it.

    Attributes:
        lost: Why it shall stop, or None.
    """

    def __init__(self, metric: str, config: Config, before: Sequence[str]) -> None:
        """Reads how the earlier runs went.

        Args:
            metric: One of `METRICS`.
            config: The run.
            before: The folders of the runs before it.
        """
        self.lost: Behind | None = None
        self._metric, self._config, self._own = metric, config, dict[int, float]()
        self._others = [{line["step"]: line[metric] for line in _evaluations(uri, metric)} for uri in before]

    def hear(self, line: Mapping[str, Any]) -> str | None:
        """Takes a line of metrics; returns why the run shall stop there, or None."""
        metric, step = self._metric, line.get("step")
        if self.lost is not None or step is None or not math.isfinite(line.get(metric, math.nan)):
            return None
        # Steps that are done again come again.
        self._own = {each: value for each, value in self._own.items() if each < step} | {step: line[metric]}
        # A run that has done its last step only has to be exported.
        if is_behind(metric, self._own, self._others) and step < (planned_steps(self._config) or math.inf):
            best = (min if METRICS[metric] == "min" else max)(self._own.values())
            reached = sum(bool(each) and max(each) >= step for each in self._others)
            reason = (
                f"after step {step} its best {metric} so far, {best:.4g}, is worse than the median of the {reached} "
                "runs before it that came so far"
            )
            self.lost = Behind(step, reason, {key: value for key, value in line.items() if key != "step"})
            return reason
        return None

    def hear_recorded(self) -> str | None:
        """The same for what the run has on record: its driver may have died before it could stop."""
        for line in _evaluations(self._config.run_uri, self._metric):
            if reason := self.hear(line):
                return reason
        return None


def read_stopped(run_uri: str) -> Behind | None:
    """Why a sweep has stopped a run; None where none has."""
    return Behind(**storage.read_json(_place(run_uri))) if storage.exists(_place(run_uri)) else None


def write_stopped(run_uri: str, lost: Behind) -> None:
    """Marks a run as stopped.

    Raises:
        StorageError: It cannot be written.
    """
    storage.write_json(_place(run_uri), asdict(lost))


def _place(run_uri: str) -> str:
    return storage.join(run_uri, "stopped_early.json")


def _evaluations(run_uri: str, metric: str) -> list[dict[str, Any]]:
    lines = storage.read_json_lines(storage.join(run_uri, "metrics.jsonl"))
    return [line for line in lines if math.isfinite(line.get(metric, math.nan))]
