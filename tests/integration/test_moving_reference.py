"""A reference that follows the policy: the losses of a plain loop that does the same, interrupted or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import plain_logps, read_lines, run_ranks, steps_of, tiny_config, write_pairs
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from dpo_ray import train
from dpo_ray.config import Config, ModelConfig, ReferenceConfig
from dpo_ray.model.shard import sharded_policy
from dpo_ray.pairs.store import open_store, read_chunk
from dpo_ray.training.checkpoint import Checkpointer, read_reference
from dpo_ray.training.manifest import read_manifest
from dpo_ray.training.moving import MovingReference
from dpo_ray.training.optimizer import build_optimizer
from dpo_ray.types import TokenizedPair, TrainState

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
EVERY, ALPHA, STEPS, RATE, BETA = 3, 0.6, 8, 1e-3, 0.1


@pytest.fixture
def pairs_file(tmp_path: Path) -> str:
    return write_pairs(tmp_path / "pairs.jsonl", 100)


def config_of(tmp_path: Path, name: str, model: Path, pairs_file: str, **sections: dict[str, Any]) -> Config:
    """Chunks of few pairs, through which the reference moves; an evaluation where it does, and one where not."""
    base: dict[str, dict[str, Any]] = {
        "data": {"train": [pairs_file], "eval_fraction": 0.1, "chunk_pairs": 16},
        "reference": {"sync_steps": EVERY, "mixup_alpha": ALPHA},
        "optimizer": {"learning_rate": RATE, "warmup_steps": 0, "schedule": "constant"},
        "objective": {"beta": BETA},
        "train": {"ledger": "full", "max_steps": STEPS, "epochs": 2, "eval_every_steps": 6},
    }
    merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in {*base, *sections}}
    return tiny_config(str(tmp_path / "storage"), name, model, pairs_file, **merged)


def mean_loss(policy: torch.nn.Module, reference: torch.nn.Module, pairs: list[TokenizedPair]) -> torch.Tensor:
    """DPO over a batch (arXiv 2305.18290, equation 7)."""
    losses = []
    for pair in pairs:
        with torch.no_grad():
            ref = plain_logps(reference, pair)
        chosen, rejected = plain_logps(policy, pair) - ref
        losses.append(-logsigmoid(BETA * (chosen - rejected)))
    return torch.stack(losses).mean()


def plain_loop(model: Path, batches: list[list[TokenizedPair]]) -> Iterator[tuple[float, Any, Any]]:
    """TR-DPO's soft update (arXiv 2404.09656) in a few lines; after each step the loss and both models."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference = deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.0)
    for step, batch in enumerate(batches, start=1):
        with torch.enable_grad():
            loss = mean_loss(policy, reference, batch)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach()), policy, reference
        if step % EVERY == 0:
            with torch.no_grad():
                for own, followed in zip(reference.parameters(), policy.parameters(), strict=True):
                    own.copy_(ALPHA * followed + (1 - ALPHA) * own)


def plain_numbers(tmp_path: Path, tiny_model: Path, run: Path) -> tuple[list[float], dict[int, float]]:
    """The losses of the plain loop over the pairs of a run's ledger, and its evaluations."""
    store = open_store(str(next((tmp_path / "storage" / "store" / "pairs").rglob("manifest.json")).parent))
    assert store is not None
    pair_of = {pair.pair_id.hex(): pair for c in (*store.train, *store.eval) for pair in read_chunk(store.uri, c)}
    ledger = read_lines(run / "ledger.jsonl")
    batches = [[pair_of[pair_id] for pair_id in entry["pair_ids"]] for entry in ledger]
    held_out = [pair for chunk in store.eval for pair in read_chunk(store.uri, chunk)]
    expected, evaluations = [], {}
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        for step, (loss, policy, reference) in enumerate(plain_loop(tiny_model, batches), start=1):
            expected.append(loss)
            if step in (6, STEPS):
                # With what the step was trained with, also where the reference moves after it.
                evaluations[step] = float(mean_loss(policy, reference, held_out))
        # That agreement is with a reference that has moved: one that stands still gives other numbers.
        assert abs(float(mean_loss(policy, start, held_out)) - evaluations[STEPS]) > 1e-3
    return expected, evaluations


@pytest.mark.slow
def test_losses_of_a_plain_loop(local_ray: None, tmp_path: Path, tiny_model: Path, pairs_file: str) -> None:
    """Eight steps, two moves."""
    result = train(config_of(tmp_path, "run", tiny_model, pairs_file))
    expected, evaluations = plain_numbers(tmp_path, tiny_model, Path(result.run_uri))
    lines = read_lines(Path(result.run_uri) / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses == pytest.approx(expected, abs=1e-5)
    found = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert found == pytest.approx(evaluations, abs=1e-5)


@pytest.mark.slow
@pytest.mark.faults
def test_losses_in_two_parts(local_ray: None, tmp_path: Path, tiny_model: Path, pairs_file: str) -> None:
    """The second with two workers and a replica over two devices: what the first has scored for the version in force is
    not scored again."""
    run, written = str(tmp_path / "storage" / "parts"), dict[Path, int]()
    wide = {"scaling": {"workers": 2}, "reference": {"devices_per_replica": 2}}
    for sections in ({"train": {"max_steps": 4}}, wide):
        train(config_of(tmp_path, "parts", tiny_model, pairs_file, **sections))
        assert all(path.stat().st_mtime_ns == at for path, at in written.items())
        written |= {path: path.stat().st_mtime_ns for path in Path(run, "reference").rglob("*.parquet")}
    expected, _ = plain_numbers(tmp_path, tiny_model, Path(run))
    assert [line["loss"] for line in steps_of(Path(run))] == pytest.approx(expected, abs=1e-5)
    stores = sorted(path.name for path in Path(run, "reference").iterdir())
    assert stores == ["version-000001-attempt-0000-packed", "version-000002-attempt-0001-packed"]
    assert read_manifest(run, f"step-{STEPS:08d}").state.reference_attempt == 1


def follow(rank: int, world: int, model: str, folder: str) -> None:
    policy = sharded_policy(ModelConfig(path=model, compute_dtype="float32"), torch.device("cpu"))
    optimizer = build_optimizer(policy, config_of(Path(folder), "x", Path(model), "x").optimizer)
    reference = MovingReference(policy, ReferenceConfig(sync_steps=2, mixup_alpha=0.25), attempt=7)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # Makes its state, and changes nothing.
    optimizer.zero_grad()
    state = TrainState(step=0)
    with Checkpointer(f"{folder}/of-{world}", policy, optimizer, 7, 5, None, reference.tensors) as checkpoints:
        for step in (1, 2, 3, 4, 5):
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.add_(1.0)
            state.step = step
            assert reference.follow(state) == (step in (2, 4))
            checkpoints.save(state, wait=True)
    assert state.reference_attempt == 7
    # After steps 2 and 4 the policy was 2 and 4 above its start: 0.25 * 2 = 0.5, 0.25 * 4 + 0.75 * 0.5 = 1.375.
    if rank == 0:
        start = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        for name, above in (("step-00000003", 0.5), ("step-00000005", 1.375)):
            plain = deepcopy(start)
            read_reference(f"{folder}/of-{world}", name, plain)
            for own, begun in zip(plain.parameters(), start.parameters(), strict=True):
                torch.testing.assert_close(own, begun + above, rtol=0, atol=1e-6)
    if world == 1:
        return
    # Written by one rank, read by two: the checkpoint goes on with the reference that it had.
    again = MovingReference(policy, ReferenceConfig(sync_steps=2, mixup_alpha=0.25), attempt=8)
    with Checkpointer(f"{folder}/of-1", policy, optimizer, 8, 5, None, again.tensors) as checkpoints:
        assert checkpoints.load("step-00000005").reference_attempt == 7
    for name, tensor in reference.tensors.items():
        assert torch.equal(again.tensors[name].to_local(), tensor.to_local())


def test_shards_follow(tmp_path: Path, tiny_model: Path) -> None:
    for world in (1, 2):
        run_ranks(follow, world, tmp_path, str(tiny_model), str(tmp_path))
    layout = json.loads((tmp_path / "of-2/checkpoints/step-00000005/attempt-0007/layout.json").read_text())
    files = {
        part["file"]
        for name, about in layout["tensors"].items()
        if name.startswith("reference.")
        for part in about["chunks"]
    }
    assert files == {"reference-0000.safetensors", "reference-0001.safetensors"}
