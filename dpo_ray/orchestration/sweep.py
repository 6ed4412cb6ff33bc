"""`dpo-ray sweep`: a run for each combination of some settings, all on the same pairs and the same reference scores.

Each is a run like any other, with a name of its own: given again, finished ones are looked at, the others go on.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from dpo_ray.config import Config, load_config
from dpo_ray.errors import ConfigError, FirstStepError, NonFiniteLossError, RecoveryError, first_line
from dpo_ray.orchestration.trainer import Result, cpus_wanted, finished_run, start_ray, train
from dpo_ray.orchestration.watch import Watcher


@dataclass(frozen=True, slots=True)
class Point:
    """A combination of settings.

    Attributes:
        values: By key.
        config: The run.
    """

    values: dict[str, Any]
    config: Config


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        point: Which.
        result: None where it failed.
        error: Why it failed, in a line.
    """

    point: Point
    result: Result | None
    error: str | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last evaluation, without prefix; of the last step in a run without evaluations."""
        if self.result is None:
            return {}
        evaluation = {key.removeprefix("eval_"): value for key, value in self.result.eval_metrics.items()}
        return evaluation or self.result.metrics

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        run, values = self.point.config.run_uri, self.point.values
        return {"run": run, "settings": values, "metrics": self.metrics, "error": self.error}

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
        found.append(Point(chosen, load_config(path, [*overrides, *settings, f"name={json.dumps(name)}"])))
    names = [point.config.name for point in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"--grid: two combinations would both be called {max(names, key=names.count)}: leave one out")
    return found


def sweep(found: Sequence[Point], watcher: Watcher | None = None) -> Iterator[Outcome]:
    """Trains one after the other; what fails by its own settings does not keep the others from it.

    Args:
        found: See `points`.
        watcher: Told what happens; None for silence.

    Raises:
        UserError: What would fail for all of them.
    """
    watcher = watcher or Watcher()
    if any(finished_run(point.config) is None for point in found):
        # Ray on this machine shall have room for the largest.
        start_ray(max((point.config for point in found), key=cpus_wanted))
    for number, point in enumerate(found, start=1):
        watcher.phase(f"run {number} of {len(found)}: {point.config.name}")
        try:
            yield Outcome(point, train(point.config, watcher))
        except (NonFiniteLossError, FirstStepError, RecoveryError) as error:
            watcher.warning(f"{point.config.name}: {error}")
            yield Outcome(point, None, first_line(error))


def _axis(text: str) -> tuple[str, list[Any]]:
    key, separator, value = text.partition("=")
    try:
        values = yaml.safe_load(value)
    except yaml.YAMLError:
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
