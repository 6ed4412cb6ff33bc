"""Twenty optimizer steps on the same pairs in the same order as TRL's `DPOTrainer`. Needs the extra `bench`.

Our side is the real one: a sharded policy, scores of the reference scorer, packing, the train step, the schedule.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers import run_ranks, tokenized
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ray.config import ModelConfig, OptimizerConfig
from dpo_ray.demo_data import byte_tokenizer, make_pairs
from dpo_ray.model.shard import sharded_policy
from dpo_ray.objective.losses import LOSSES, AnswerStats
from dpo_ray.objective.rewards import finish_metrics
from dpo_ray.pairs import pack
from dpo_ray.reference.scorer import Scorer
from dpo_ray.training.optimizer import build_optimizer, learning_rate_at
from dpo_ray.training.step import Objective, train_step
from dpo_ray.types import ScoredPair

trl = pytest.importorskip("trl", reason="needs the extra `bench`")
datasets = pytest.importorskip("datasets", reason="needs the extra `bench`")
pytestmark = [pytest.mark.bench, pytest.mark.timeout(300)]

STEPS, BATCH, RATE, WARMUP, BETA = 20, 4, 1e-3, 5, 0.1
NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "grad_norm")


def sigmoid(stats: AnswerStats) -> torch.Tensor:
    return LOSSES["sigmoid"].fn(stats, beta=BETA, label_smoothing=0.0)


def ours(rank: int, world: int, model: str, rows: list[dict[str, str]], target: str) -> None:
    pairs = tokenized(rows, byte_tokenizer(), "none")
    scores = Scorer(model, "float32", "sdpa", 400, torch.device("cpu")).score(pairs)
    scored = [ScoredPair(pair, score) for pair, score in zip(pairs, scores, strict=True)]
    policy = sharded_policy(ModelConfig(path=model, compute_dtype="float32"), torch.device("cpu"))
    config = OptimizerConfig(learning_rate=RATE, schedule="linear", warmup_steps=WARMUP)
    optimizer, rate = build_optimizer(policy, config), learning_rate_at(config, STEPS)
    lines = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        batch = scored[step * BATCH : (step + 1) * BATCH]
        rows_ = pack.table_of(pack.rank_batches(batch, step + 1, 0, world, pack.Costs())).to_pylist()
        mine = pack.global_batch(rows_[rank], 400, pack.Costs())
        result = train_step(policy, optimizer, mine, Objective(sigmoid, False, BETA), 1.0)
        assert result.grad_norm is not None
        lines.append({**finish_metrics(result.sums), "grad_norm": float(result.grad_norm)})
    if rank == 0:
        Path(target).write_text(json.dumps(lines))


def test_trajectory(tmp_path: Path, tiny_model: Path) -> None:
    rows = make_pairs(STEPS * BATCH, seed=3)
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        disable_tqdm=True,
        loss_type=["sigmoid"],
        beta=BETA,
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
    )
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    for world in (1, 2):
        target = tmp_path / f"ours-{world}.json"
        run_ranks(ours, world, tmp_path, str(tiny_model), rows, str(target))
        for step, (mine, other) in enumerate(zip(json.loads(target.read_text()), theirs, strict=True), start=1):
            for name in NAMES:
                assert mine[name] == pytest.approx(other[name], abs=1e-4), f"step {step}: {name}"
    # The trajectory is one of learning: agreement at a standstill would mean nothing.
    assert theirs[-1]["rewards/margins"] > 0.05
