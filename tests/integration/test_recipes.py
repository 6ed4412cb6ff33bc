"""Every shipped recipe trains: its objective, optimizer, schedule and adapter on a tiny model, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_ranks, tokenized

from dpo_ray.config import Config, load_config
from dpo_ray.demo_data import byte_tokenizer, make_pairs
from dpo_ray.model.shard import sharded_policy
from dpo_ray.pairs import pack
from dpo_ray.reference.scorer import Scorer
from dpo_ray.training.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from dpo_ray.training.step import objective_of, train_step
from dpo_ray.types import ScoredPair

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))
STEPS, BATCH, CPU = 3, 8, torch.device("cpu")


def on_a_cpu(path: Path, model: str) -> Config:
    """A recipe with what is about its size changed, and at its peak learning rate from the second step on."""
    config = load_config(
        str(path),
        [
            f"model.path={model}",
            "model.compute_dtype=float32",
            "scaling.workers=1",
            "scaling.gpus_per_worker=0",
            "reference.gpus_per_replica=0",
            "optimizer.warmup_steps=1",
            "optimizer.schedule=constant_with_warmup",
            "optimizer.learning_rate=1e-3",
        ],
    )
    assert config.model.path == model
    return config


def recipes(rank: int, world: int, model: str) -> None:
    pairs: list[Any] = tokenized(make_pairs(BATCH, seed=2), byte_tokenizer())
    scores = Scorer(model, "float32", "packed", 500, CPU).score(pairs)
    for path in JOBS:
        whole = on_a_cpu(path, model)
        for config in [whole, *([whole.start()] if whole.sft.epochs else [])]:
            policy = sharded_policy(config.model, CPU, config.adapter, config.seed)
            optimizer = build_optimizer(policy, config.optimizer)
            rate, objective = learning_rate_at(config.optimizer, STEPS), objective_of(config.objective)
            known = scores if config.needs_reference else [None] * len(scores)
            scored = [ScoredPair(pair, score) for pair, score in zip(pairs, known, strict=True)]
            losses = []
            for step in range(STEPS):
                set_learning_rate(optimizer, rate(step))
                (row,) = pack.table_of(pack.rank_batches(scored, step + 1, 0, 1, pack.Costs())).to_pylist()
                batch = pack.global_batch(row, 500, pack.Costs())
                result = train_step(policy, optimizer, batch, objective, config.optimizer.max_grad_norm)
                losses.append(float(result.sums[0]) / BATCH)
            # The first step's learning rate is 0.
            assert losses[1] == pytest.approx(losses[0], abs=1e-6), path.name
            assert losses[2] < losses[1], path.name


def test_recipes(tmp_path: Path, tiny_model: Path) -> None:
    assert len(JOBS) >= 9
    run_ranks(recipes, 1, tmp_path, str(tiny_model))
