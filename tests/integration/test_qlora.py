"""QLoRA: an adapter beside weights in 4 bits, which each rank holds whole."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import run_ranks, tiny_config, tokenized
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from dpo_ray.config import AdapterConfig, ModelConfig, OptimizerConfig
from dpo_ray.demo_data import byte_tokenizer, make_pairs
from dpo_ray.model.adapter import adapter_off
from dpo_ray.model.export import export
from dpo_ray.model.load import load_pretrained
from dpo_ray.model.shard import sharded_policy
from dpo_ray.objective.losses import LOSSES
from dpo_ray.pairs import pack
from dpo_ray.reference.scorer import Scorer, score_pairs
from dpo_ray.training.checkpoint import Checkpointer
from dpo_ray.training.optimizer import build_optimizer
from dpo_ray.training.step import Objective, train_step
from dpo_ray.types import ScoredPair, TokenizedPair, TrainState

functional = pytest.importorskip("bitsandbytes.functional", reason="needs the extra bitsandbytes")

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
CPU = torch.device("cpu")
RANK, ALPHA = 2, 8.0


def build(model: str, **options: Any) -> tuple[Any, Any]:
    config = ModelConfig(**{"path": model, "compute_dtype": "float32", **options.pop("model", {})})
    policy = sharded_policy(config, CPU, AdapterConfig(rank=RANK, alpha=ALPHA, **options))
    return policy, build_optimizer(policy, OptimizerConfig(learning_rate=1e-2))


def step(policy: Any, optimizer: Any, pairs: list[ScoredPair], rank: int, world: int, number: int) -> float:
    loss = partial(LOSSES["sigmoid"].fn, beta=0.1, label_smoothing=0.0)
    rows = pack.table_of(pack.rank_batches(pairs, number, 0, world, pack.Costs())).to_pylist()
    batch = pack.global_batch(rows[rank], 500, pack.Costs())
    result = train_step(policy, optimizer, batch, Objective(loss, couples_pairs=False, beta=0.1), 1.0)
    return float(result.sums[0]) / len(pairs)


def rounded_to_nf4(model: Path, folder: Path) -> None:
    """Writes the model whose weights are what is left of another's in 4 bits."""
    whole = load_pretrained(str(model), "float32", "sdpa")
    with torch.no_grad():
        for name, module in whole.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                quantized = functional.quantize_4bit(module.weight, quant_type="nf4", compress_statistics=True)
                module.weight.copy_(functional.dequantize_4bit(*quantized))
    whole.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def scored_pairs(model: str) -> list[ScoredPair]:
    pairs = [pair for pair in tokenized(make_pairs(10, seed=2), byte_tokenizer()) if isinstance(pair, TokenizedPair)]
    return [
        ScoredPair(*both) for both in zip(pairs, Scorer(model, "float32", "sdpa", 500, CPU).score(pairs), strict=True)
    ]


def trained(rank: int, world: int, dora: bool, model: str, rounded: str, run: str) -> None:
    policy, optimizer = build(model, quantize="nf4", dora=dora)
    original = load_pretrained(model, "float32", "sdpa")
    weights = {name: p for name, p in policy.named_parameters() if p.dtype == torch.uint8}
    assert len(weights) == 2 * 7
    for name, parameter in weights.items():
        # Whole on each rank: two to a byte.
        assert 2 * parameter.numel() == original.get_parameter(name.replace(".base_layer", "")).numel()
        assert not isinstance(parameter, DTensor)
    pairs = scored_pairs(rounded)
    with adapter_off(policy):
        scores = score_pairs(policy, [each.pair for each in pairs], 500, torch.distributed.group.WORLD, lambda: None)
    for found, scored in zip(scores, pairs, strict=True):
        np.testing.assert_allclose(found, scored.ref_logps, rtol=1e-5)

    beside = build(rounded, dora=dora)
    expected = [step(*beside, pairs, rank, world, number) for number in (1, 2, 3, 4)]
    losses = [step(policy, optimizer, pairs, rank, world, number) for number in (1, 2, 3)]
    with Checkpointer(run, policy, optimizer, attempt=0, keep=1) as checkpoints:
        checkpoints.save(TrainState(3, 30))
    adapter = {"rank": RANK, "alpha": ALPHA, "quantize": "nf4", "dora": dora}
    config = tiny_config(run, "exported", Path(model), "pairs", adapter=adapter, reference={"place": "adapter_off"})
    export(policy, config, 3, rank, lambda: None)
    matrices = {name: p.full_tensor().detach() for name, p in policy.named_parameters() if p.requires_grad}
    if rank == 0:
        merged = load_file(f"{run}/exported/export/model.safetensors")
        for name in weights:
            a, b = (matrices[name.replace("base_layer", f"lora_{matrix}.default")] for matrix in "AB")
            plain = name.replace(".base_layer", "")
            expected_weight = original.get_parameter(plain) + ALPHA / RANK * b @ a
            if dora:
                magnitudes = matrices[name.replace("base_layer", "lora_magnitude_vector.default")]
                expected_weight *= (magnitudes / expected_weight.norm(dim=1))[:, None]
            torch.testing.assert_close(merged[plain], expected_weight, msg=name)
    losses.append(step(policy, optimizer, pairs, rank, world, 4))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[3] < losses[0] - 1e-3
    if rank == 0:
        Path(run, "loss.json").write_text(json.dumps(losses[3]))


def resumed(rank: int, world: int, model: str, rounded: str, run: str) -> None:
    policy, optimizer = build(model, quantize="nf4")
    with Checkpointer(run, policy, optimizer, attempt=1, keep=1) as checkpoints:
        assert checkpoints.load("step-00000003") == TrainState(3, 30)
    expected = json.loads(Path(run, "loss.json").read_text())
    assert step(policy, optimizer, scored_pairs(rounded), rank, world, 4) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_beside_weights_in_4_bits(tmp_path: Path, tiny_model: Path, dora: bool) -> None:
    """Scores and losses of an adapter beside the same weights rounded to 4 bits; merged into the weights as they were.

    And checkpoints hold the adapter alone, for other world sizes.
    """
    rounded = tmp_path / "rounded"
    rounded_to_nf4(tiny_model, rounded)
    arguments = str(tiny_model), str(rounded), str(tmp_path / "run")
    run_ranks(trained, 2, tmp_path, dora, *arguments)
    if dora:
        return  # Of its checkpoints nothing is left to see.
    (layout,) = (tmp_path / "run" / "checkpoints").glob("*/attempt-0000/layout.json")
    saved = json.loads(layout.read_text())["tensors"]
    assert len(saved) == 4 * 2 * 7 * 2  # Two matrices a layer, each with two moments and a count of steps.
    assert all(".lora_A." in name or ".lora_B." in name for name in saved)
    run_ranks(resumed, 1, tmp_path, *arguments)
