"""Optimizers that see more than a number at a time: each rank's part of what others' code makes of whole weights."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import run_ranks, tokenized
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from dpo_ray.config import ModelConfig, OptimizerConfig
from dpo_ray.demo_data import byte_tokenizer, make_pairs, tiny_llama_config
from dpo_ray.model.shard import sharded_policy
from dpo_ray.objective.losses import LOSSES
from dpo_ray.pairs import pack
from dpo_ray.reference.scorer import Scorer
from dpo_ray.training.checkpoint import Checkpointer
from dpo_ray.training.checkpoint_tensors import tensors_of
from dpo_ray.training.optimizer import build_optimizer
from dpo_ray.training.step import Objective, train_step
from dpo_ray.types import ScoredPair, TokenizedPair, TrainState

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
CPU = torch.device("cpu")
RATE, DECAY = 1e-3, 0.1
NUM_STEPS = 10
SIDES = {"adamw_8bit": 256, "muon": 64}
IN_8_BITS = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra bitsandbytes")

THEIR_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")


def build(model: str, name: Any, group: int | None = None) -> tuple[Any, Any]:
    policy = sharded_policy(ModelConfig(path=model, compute_dtype="float32"), CPU, group=group)
    return policy, build_optimizer(policy, OptimizerConfig(name=name, learning_rate=RATE, weight_decay=DECAY))


def scored_pairs(model: str) -> list[ScoredPair]:
    pairs = [pair for pair in tokenized(make_pairs(6, seed=2), byte_tokenizer()) if isinstance(pair, TokenizedPair)]
    scores = Scorer(model, "float32", "sdpa", 500, CPU).score(pairs)
    return [ScoredPair(*both) for both in zip(pairs, scores, strict=True)]


def losses_of(
    policy: Any, optimizer: Any, pairs: list[ScoredPair], rank: int, world: int, first: int
) -> Iterator[float]:
    """Of steps, each of which is done when it is asked for."""
    loss = partial(LOSSES["sigmoid"].fn, beta=0.1, label_smoothing=0.0)
    for number in range(first, NUM_STEPS + 1):
        rows = pack.table_of(pack.rank_batches(pairs, number, 0, world, pack.Costs())).to_pylist()
        batch = pack.global_batch(rows[rank], 500, pack.Costs())
        result = train_step(policy, optimizer, batch, Objective(loss, couples_pairs=False, beta=0.1), 1.0)
        yield float(result.sums[0]) / len(pairs)


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


def theirs(name: str, values: dict[str, torch.nn.Parameter]) -> list[Any]:
    """The optimizers of others, over whole tensors."""
    matrices = [value for key, value in values.items() if "_proj" in key]
    if name == "muon":
        first: Any = torch.optim.Muon(matrices, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    else:
        from bitsandbytes.optim import AdamW8bit

        first = AdamW8bit(matrices, lr=RATE, weight_decay=DECAY, min_8bit_size=1)
    rest = [value for value in values.values() if not any(value is matrix for matrix in matrices)]
    groups = [
        {"params": [v for v in rest if (v.ndim > 1) == decayed], "weight_decay": decayed * DECAY}
        for decayed in (True, False)
    ]
    return [first, torch.optim.AdamW(groups, lr=RATE)]


def trained(rank: int, world: int, name: str, model: str, folder: str) -> None:
    """Ten steps, the first three beside the others' optimizers, with a checkpoint then."""
    pairs = scored_pairs(model)
    policy, optimizer = build(model, name)
    parameters = dict(policy.named_parameters())
    values = {key: torch.nn.Parameter(value) for key, value in whole(parameters).items()}
    others, update = theirs(name, values), optimizer.step

    def both() -> None:
        for key, value in whole({key: p.grad for key, p in parameters.items()}).items():
            values[key].grad = value
        update()
        # torch's Muon multiplies in bfloat16: not here.
        with patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            for other in others:
                other.step()

    optimizer.step = both
    steps = losses_of(policy, optimizer, pairs, rank, world, 1)
    losses = [next(steps) for _ in range(3)]
    for key, value in whole(parameters).items():
        torch.testing.assert_close(
            value, values[key].detach(), rtol=1e-5, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}"
        )
    optimizer.step = update
    held = whole(tensors_of(policy, optimizer))
    kept = {key: value for key, value in held.items() if "q_proj" in key and key.startswith("optimizer.")}
    # Two bytes a number, two scales of four bytes for 256 of them, here a row, and the step; Muon has one moment.
    expected = SIDES[name] ** 2 * (2 + 2 * 4 / 256) + 4 if name == "adamw_8bit" else SIDES[name] ** 2 * 4
    assert sum(value.nbytes for value in kept.values()) == expected
    with Checkpointer(folder, policy, optimizer, attempt=0, keep=1) as checkpoints:
        checkpoints.save(TrainState(3, 30))
    losses += steps
    assert losses[-1] < losses[0] - 0.05
    if rank == 0:
        save_file(held, f"{folder}/held.safetensors")
        Path(folder, "losses.json").write_text(json.dumps(losses))


def again(rank: int, world: int, name: str, model: str, folder: str, group: int | None) -> None:
    """At another world size, or in copies, the same losses, and the same bits of a checkpoint."""
    pairs, expected = scored_pairs(model), json.loads(Path(folder, "losses.json").read_text())
    policy, optimizer = build(model, name, group)
    # A sum in another order can move a moment to the next of 256 codes.
    assert list(losses_of(policy, optimizer, pairs, rank, world, 1)) == pytest.approx(expected, rel=1e-5, abs=5e-6)
    with Checkpointer(folder, policy, optimizer, attempt=1, keep=1) as checkpoints:
        assert checkpoints.load("step-00000003") == TrainState(3, 30)
    here, there = whole(tensors_of(policy, optimizer)), load_file(f"{folder}/held.safetensors")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key], there[key]) for key in here)
    assert list(losses_of(policy, optimizer, pairs, rank, world, 4)) == pytest.approx(expected[3:], rel=1e-5, abs=5e-6)


@pytest.mark.parametrize("name", [pytest.param("adamw_8bit", marks=IN_8_BITS), pytest.param("muon", marks=THEIR_MUON)])
def test_no_number_depends_on_the_world_size(tmp_path: Path, name: str) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    shape = tiny_llama_config(len(tokenizer), hidden_size=SIDES[name], num_layers=1, num_heads=4)
    LlamaForCausalLM(shape).save_pretrained(model)
    tokenizer.save_pretrained(model)
    run_ranks(trained, 2, tmp_path, name, str(model), str(run))
    for world, group in ((3, None), (4, 2)):
        run_ranks(again, world, tmp_path, name, str(model), str(run), group)
