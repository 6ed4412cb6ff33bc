"""Throughput: what counts as time, and utilisation by its formula."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dpo_ray.training import metrics
from dpo_ray.training.metrics import Stopwatch, slowest


def test_frozen_weights_have_no_gradient_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 30 numbers 25 are frozen: 4 x 25 + 6 x 5 operations for a token."""
    clock = iter([0.0, 4.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(metrics, "peak_flops", lambda device, dtype: 5000.0)
    model = nn.Linear(5, 5)
    model.weight.requires_grad_(False)
    config: Any = SimpleNamespace(model=SimpleNamespace(compute_dtype="bfloat16"))
    watch = Stopwatch(model, config, SimpleNamespace(device=torch.device("cpu"), world_size=1))  # type: ignore[arg-type]
    batch: Any = SimpleNamespace(num_pairs=8, reference_wait_s=0.0)
    result: Any = SimpleNamespace(num_tokens=torch.tensor(200.0), rank_s=torch.tensor([1.0]))
    found = watch.step(batch, result)
    assert found["perf/mfu"] == pytest.approx((4 * 25 + 6 * 5) * 200 / (4 * 5000))


def test_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps that end at 10 s and 14 s; for the second, the batch is asked for at 11 s and there at 11.5 s.

    A model of 30 numbers and 200 tokens: 6 x 30 x 200 operations in 4 s on 2 devices that do 5,000 a second.
    """
    clock = iter([0.0, 1.0, 2.0, 10.0, 11.0, 11.5, 14.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(metrics, "peak_flops", lambda device, dtype: 5000.0)
    config: Any = SimpleNamespace(model=SimpleNamespace(compute_dtype="bfloat16"))
    context: Any = SimpleNamespace(device=torch.device("cpu"), world_size=2)
    watch = Stopwatch(nn.Linear(5, 5), config, context)
    batch: Any = SimpleNamespace(num_pairs=8, reference_wait_s=2.0)
    result: Any = SimpleNamespace(num_tokens=torch.tensor(200.0), rank_s=torch.tensor([2.0, 5.0]))
    for _ in range(2):
        watch.asked()
        watch.got()
        found = watch.step(batch, result)
    assert found == {
        "perf/step_s": 4.0,
        "perf/data_wait_s": 0.5,
        "perf/reference_wait_s": 0.5,
        "perf/between_steps_s": 1.0,
        "perf/pairs_per_s": 2.0,
        "perf/tokens_per_s": 50.0,
        "perf/mfu": pytest.approx(6 * 30 * 200 / (4 * 2 * 5000)),
        "perf/slowest_rank": 1,
        "perf/rank_spread": 2.5,
    }


def test_the_slowest_rank() -> None:
    """Against the median, which half of the ranks being slow does not move."""
    assert slowest([3.0, 1.0, 2.0, 8.0]) == {"perf/slowest_rank": 3, "perf/rank_spread": 4.0}
    assert slowest([2.0, 2.0]) == {"perf/slowest_rank": 0, "perf/rank_spread": 1.0}
    assert slowest([2.0]) == slowest([0.0, 0.0]) == slowest([0.0, 0.0, 1.0]) == {}
