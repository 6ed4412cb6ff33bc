"""LoRA: only the adapter is trained and kept, and the policy without it is the reference."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from helpers import run_ranks, steps_of, tiny_config, tokenized, write_pairs
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from dpo_ray import train
from dpo_ray.config import AdapterConfig, Config, ModelConfig, OptimizerConfig
from dpo_ray.demo_data import byte_tokenizer, make_pairs, tiny_llama_config
from dpo_ray.errors import CheckpointError, ConfigError
from dpo_ray.model.adapter import adapter_off
from dpo_ray.model.load import load_pretrained
from dpo_ray.model.shard import sharded_policy
from dpo_ray.objective.losses import LOSSES
from dpo_ray.orchestration.prepare import prepare
from dpo_ray.orchestration.reference_filler import open_reference_store
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.pairs import pack
from dpo_ray.pairs.store import PairStore, read_chunk
from dpo_ray.reference.scorer import Scorer
from dpo_ray.training.checkpoint import Checkpointer, tensors_of
from dpo_ray.training.optimizer import build_optimizer
from dpo_ray.training.step import Objective, train_step
from dpo_ray.types import ScoredPair, TokenizedPair, TrainState

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
CPU = torch.device("cpu")
RANK, ALPHA, BETA, RATE = 2, 8.0, 0.1, 1e-2
ADAPTER = AdapterConfig(rank=RANK, alpha=ALPHA)
MATRICES = 2 * 7 * 2  # A and B, of seven linear layers, in two blocks.


def build(model: str, adapter: AdapterConfig = ADAPTER, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    config = ModelConfig(**{"path": model, "compute_dtype": "float32", **options})
    policy = sharded_policy(config, CPU, adapter, seed)
    return policy, build_optimizer(policy, OptimizerConfig(learning_rate=RATE))


def scored_pairs(model: str, num: int = 10) -> list[ScoredPair]:
    pairs = [pair for pair in tokenized(make_pairs(num, seed=2), byte_tokenizer()) if isinstance(pair, TokenizedPair)]
    return [ScoredPair(*both) for both in zip(pairs, Scorer(model, "float32", "sdpa", 500, CPU).score(pairs))]


def step(policy: Any, optimizer: Any, pairs: list[ScoredPair], rank: int, world: int, number: int) -> float:
    """One step without clipping: its loss."""
    loss = lambda stats: LOSSES["sigmoid"].fn(stats, beta=BETA, label_smoothing=0.0)  # noqa: E731
    rows = pack.table_of(pack.rank_batches(pairs, number, 0, world, pack.Costs())).to_pylist()
    batch = pack.global_batch(rows[rank], 500, pack.Costs())
    result = train_step(policy, optimizer, batch, Objective(loss, couples_pairs=False, beta=BETA), None)
    return float(result.sums[0]) / len(pairs)


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


def plain_logps(model: Any, pair: TokenizedPair) -> list[torch.Tensor]:
    """One answer at a time through the model's own forward."""
    found = []
    for answer in pair.answers:
        tokens = torch.tensor([*pair.prompt, *answer])
        logps = model(tokens[None]).logits[0, len(pair.prompt) - 1 : -1].log_softmax(-1)
        found.append(logps.gather(1, tokens[len(pair.prompt) :, None]).sum())
    return found


def plain_peft(model: str, values: dict[str, torch.Tensor]) -> Any:
    """peft's own model with the same matrices."""
    lora = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM")
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), lora)
    own = {name.removeprefix("base_model.model."): p for name, p in plain.named_parameters() if p.requires_grad}
    assert own.keys() == values.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(values[name])
    return plain, own


def trained(rank: int, world: int, model: str, folder: str) -> None:
    policy, optimizer = build(model)
    pairs = scored_pairs(model)
    assert type(policy).__name__.endswith("LlamaForCausalLM")
    ours = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert len(ours) == MATRICES
    assert all("lora_A" in name or "lora_B" in name for name in ours)
    before = whole(dict(policy.named_parameters()))
    original = load_pretrained(model, "float32", "sdpa").state_dict()
    frozen = {name.replace(".base_layer", "") for name in before if name not in ours}
    assert frozen == original.keys() - {"lm_head.weight"}  # Which is tied to the embedding.
    for name, value in before.items():
        if "lora_A" in name:
            # Kaiming's uniform bound, as peft has it; hardly any of it is within a tenth of the middle.
            bound = 1 / math.sqrt(value.shape[1])
            assert 0.6 * bound < value.abs().max() <= bound
        elif "lora_B" in name:
            assert not value.any()
        else:
            assert torch.equal(value, original[name.replace(".base_layer", "")]), name
    other_seed = whole(dict(build(model, seed=1)[0].named_parameters()))
    assert all(torch.equal(other_seed[name], before[name]) == ("lora_A" not in name) for name in before)

    # Away from the start, where the gradient of A is zero: the step that peft and autograd give.
    generator = torch.Generator().manual_seed(7)
    values = {
        name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in before.items() if name in ours
    }
    with torch.no_grad():
        for name, parameter in ours.items():
            parts = torch.chunk(values[name], world)
            if rank < len(parts):
                parameter.to_local().copy_(parts[rank])
    plain, own = plain_peft(model, values)
    losses = []
    for scored in pairs:
        chosen, rejected = plain_logps(plain, scored.pair)
        assert scored.ref_logps is not None
        losses.append(-logsigmoid(BETA * (chosen - rejected - float(scored.ref_logps[0] - scored.ref_logps[1]))))
    expected = torch.stack(losses).mean()
    expected.backward()
    grads: dict[str, torch.Tensor] = {}
    update = optimizer.step
    optimizer.step = lambda: (grads.update(whole({name: p.grad for name, p in ours.items()})), update())[1]
    assert step(policy, optimizer, pairs, rank, world, 1) == pytest.approx(float(expected), rel=1e-5)
    for name, parameter in own.items():
        assert parameter.grad.abs().max() > 1e-4, name
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
    torch.optim.AdamW(own.values(), lr=RATE, weight_decay=0.0).step()
    for name, value in whole(dict(policy.named_parameters())).items():
        if name in own:
            assert not torch.equal(value, values[name]), name
            torch.testing.assert_close(value, own[name].detach(), rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert torch.equal(value, before[name]), name

    # Off, it is the reference again; and on again what it was.
    with torch.no_grad():
        on = policy.token_scores(*laid_out(pairs))[0].logps
        with adapter_off(policy):
            off = Scorer.of(policy, 500, torch.distributed.group.WORLD).score([each.pair for each in pairs])
        assert torch.equal(policy.token_scores(*laid_out(pairs))[0].logps, on)
    for found, scored in zip(off, pairs, strict=True):
        np.testing.assert_allclose(found, scored.ref_logps, rtol=1e-5)
    assert all(p.requires_grad == (name in ours) for name, p in policy.named_parameters())

    with Checkpointer(folder, policy, optimizer, attempt=0, keep=2) as checkpoints:
        checkpoints.save(TrainState(1, 10))
    held = whole(tensors_of(policy, optimizer))
    loss = step(policy, optimizer, pairs, rank, world, 2)
    if rank == 0:
        save_file(held, f"{folder}/held-{world}.safetensors")
        Path(folder, f"loss-{world}.json").write_text(json.dumps(loss))


def laid_out(pairs: list[ScoredPair]) -> tuple[torch.Tensor, list[list[int]]]:
    batch = pack.microbatch(pairs)
    return batch.tokens, batch.lengths


def resumed(rank: int, world: int, model: str, folder: str, loss: float) -> None:
    policy, optimizer = build(model, seed=5)
    with Checkpointer(folder, policy, optimizer, attempt=1, keep=2) as checkpoints:
        assert checkpoints.load("step-00000001") == TrainState(1, 10)
    here = whole(tensors_of(policy, optimizer))
    (there,) = (load_file(path) for path in Path(folder).glob("held-*.safetensors"))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert step(policy, optimizer, scored_pairs(model), rank, world, 2) == pytest.approx(loss, rel=1e-5)
    other = build(model, AdapterConfig(rank=RANK + 1, alpha=ALPHA))
    with pytest.raises(CheckpointError, match=r"another model, adapter or optimizer: model\..*lora_A"):
        Checkpointer(folder, *other, attempt=1, keep=2).load("step-00000001")


@pytest.mark.parametrize("world", [1, 2])
def test_only_the_adapter_is_trained_and_kept(tmp_path: Path, tiny_model: Path, world: int) -> None:
    """The base model at the start, peft's gradients in the step, and checkpoints for other world sizes."""
    run_ranks(trained, world, tmp_path, str(tiny_model), str(tmp_path))
    (layout,) = (tmp_path / "checkpoints").glob("*/attempt-0000/layout.json")
    saved = json.loads(layout.read_text())["tensors"]
    assert len(saved) == 4 * MATRICES  # Each with two moments and a count of steps.
    assert all(".lora_A." in name or ".lora_B." in name for name in saved)
    loss = json.loads((tmp_path / f"loss-{world}.json").read_text())
    for other in {1, 2, 3} - {world}:
        run_ranks(resumed, other, tmp_path, str(tiny_model), str(tmp_path), loss)
