"""What a run's gauges say of what the driver is told."""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from typing import Any

import pytest

from dpo_ray.config import Config, parse_config
from dpo_ray.errors import ConfigError, NonFiniteLossError, StoppedError
from dpo_ray.orchestration.gauges import FAILURES, FILLED, GAUGES, LINE, Gauges
from dpo_ray.orchestration.reference_filler import Filled
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.types import Attempt


class Listener(Watcher):
    """Who is told too."""

    def __init__(self) -> None:
        self.lines = list[dict[str, Any]]()

    def line(self, line: dict[str, Any]) -> None:
        self.lines.append(line)


@pytest.fixture
def config() -> Config:
    return parse_config(
        {
            "name": "run",
            "storage_path": "/s",
            "model": {"path": "/m"},
            "data": {"train": ["/p"]},
            "scaling": {"workers": {"min": 2, "max": 8}},
        }
    )


def attempt(number: int, position: int) -> Attempt:
    return Attempt(number, 1, position, None, 4, "start", "now")


def test_names_are_as_prometheus_has_them() -> None:
    assert {*LINE.values(), *FILLED.values()} <= GAUGES.keys()
    for name, (labels, about) in GAUGES.items():
        assert re.fullmatch("dpo_[a-z_]+", name)
        # These endings belong to counters and histograms.
        assert not name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert about.endswith(".")
        assert "run" not in labels


def test_every_watcher_is_handed_everything() -> None:
    told = {name for name in vars(Watcher) if not name.startswith("_")}
    assert told == {name for name in vars(Gauges) if not name.startswith("_")}


def test_a_run_with_a_failure(config: Config) -> None:
    listener = Listener()
    before = time.time()
    with Gauges(config, listener) as gauges:
        gauges.began(attempt(0, 0))
        started = gauges.values["dpo_last_checkpoint_timestamp_seconds", ""]
        assert before <= started <= time.time()
        gauges.line({"step": 7, "loss": 0.5, "rewards/margins": 0.25, "perf/data_wait_s": 3.0, "unknown": 1})
        gauges.line({"warning": "something"})
        gauges.scored(asdict(Filled(left_chunks=3)))
        gauges.ended("node")
        assert gauges.values["dpo_workers", ""] == 0
        gauges.began(attempt(1, 5))
        # The age of the newest checkpoint is no younger by a failure.
        assert gauges.values["dpo_last_checkpoint_timestamp_seconds", ""] == started
        gauges.line({"checkpoint": 10})
    found = gauges.values
    assert found["dpo_last_checkpoint_timestamp_seconds", ""] > started
    assert {name: found[name, ""] for name in ("dpo_step", "dpo_checkpoint_step", "dpo_attempt", "dpo_workers")} == {
        "dpo_step": 5,
        "dpo_checkpoint_step": 10,
        "dpo_attempt": 1,
        "dpo_workers": 4,
    }
    assert (found["dpo_workers_min", ""], found["dpo_workers_max", ""]) == (2, 8)
    assert (found["dpo_reward_margin", ""], found["dpo_data_wait_seconds", ""]) == (0.25, 3.0)
    assert found["dpo_reference_chunks_left", ""] == 3
    assert ("dpo_reference_pairs_per_second", "") not in found
    assert [found["dpo_failures", kind] for kind in FAILURES] == [kind == "node" for kind in FAILURES]
    assert {name for name, _ in found} <= GAUGES.keys()
    assert [*listener.lines[1], *listener.lines[2]] == ["warning", "checkpoint"]


@pytest.mark.parametrize(
    ("error", "finals", "finite"),
    [(NonFiniteLossError("nan"), 1, 0), (ConfigError("wrong"), 1, 1), (StoppedError("stop", 15), 0, 1)],
)
def test_how_a_run_ends(config: Config, error: Exception, finals: int, finite: int) -> None:
    def run(gauges: Gauges) -> None:
        with gauges:
            gauges.began(attempt(0, 0))
            raise error

    gauges = Gauges(config, Watcher())
    with pytest.raises(type(error)):
        run(gauges)
    assert (gauges.values["dpo_failures", "final"], gauges.values["dpo_loss_finite", ""]) == (finals, finite)
