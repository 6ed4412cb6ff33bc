"""Whoever dies while checkpoints are evaluated beside training: each evaluation is there once, and right."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_ray.training import manifest
from faults.harness import Place, named, until

pytestmark = [pytest.mark.faults, pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]


def test_workers_then_the_driver_die(place: Place, twin: str, drivers: Any) -> None:
    """A worker dies, the replica stands still, all checkpoints wait, the driver dies: the same command evaluates."""
    config = place.config("beside", train={"eval_place": "actors", "keep_checkpoints": 1})
    driver = place.start(config, {"point": "backward", "rank": 1, "step": 10, "do": "kill"})
    drivers.append(driver)
    until(lambda: named(driver, "EvaluationReplica"), driver)[0].suspend()
    driver.wait_for(lambda said: said["event"] == "phase" and said["text"] == "waiting for the last evaluations")
    # The newest alone would be kept.
    assert [manifest.step_of(name) for name in manifest.committed(place.uri("beside"))] == [8, 16, 24]
    driver.kill()
    again = place.start(config)
    drivers.append(again)
    again.finish()
    place.assert_like_twin("beside", twin)
    # Nobody had to train for it.
    assert [attempt["position"] for attempt in place.attempts("beside")] == [0, 8]
    found, expected = (
        [line for line in place.lines(run, "metrics.jsonl") if "eval_loss" in line] for run in ("beside", twin)
    )
    assert [line["step"] for line in found] == [8, 16, 24]
    for line, by_workers in zip(found, expected, strict=True):
        assert line.keys() == by_workers.keys()
        ours, theirs = ({**each, "eval_perf/seconds": 0.0} for each in (line, by_workers))
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert [manifest.step_of(name) for name in manifest.committed(place.uri("beside"))] == [24]
