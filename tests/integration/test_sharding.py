"""FSDP2 over gloo in real processes: sharded weights, the step, and checkpoints at other world sizes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_ranks, tokenized
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from dpo_ray import storage
from dpo_ray.config import ModelConfig, OptimizerConfig
from dpo_ray.demo_data import byte_tokenizer, make_pairs
from dpo_ray.errors import CheckpointError
from dpo_ray.model.load import load_pretrained
from dpo_ray.model.shard import gathered_state_dict, sharded_policy
from dpo_ray.objective.losses import LOSSES, AnswerStats
from dpo_ray.pairs import pack
from dpo_ray.reference.scorer import Scorer
from dpo_ray.training import checkpoint, manifest
from dpo_ray.training.optimizer import build_optimizer
from dpo_ray.training.step import Objective, train_step
from dpo_ray.types import ScoredPair, TrainState

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
CPU = torch.device("cpu")


def sigmoid(stats: AnswerStats) -> torch.Tensor:
    return LOSSES["sigmoid"].fn(stats, beta=0.1, label_smoothing=0.0)


def scored_pairs(model: str, num: int = 10, dtype: str = "float32") -> list[ScoredPair]:
    pairs = tokenized(make_pairs(num, seed=2), byte_tokenizer())
    scores = Scorer(model, dtype, "sdpa", 500, CPU).score(pairs)
    return [ScoredPair(pair, score) for pair, score in zip(pairs, scores, strict=True)]


def build(model: str, rate: float = 1e-2, **options: Any) -> tuple[Any, Any]:
    config = ModelConfig(**{"path": model, "compute_dtype": "float32", **options})
    name = "adamw_kahan" if config.weights_dtype == "bfloat16" else "adamw"
    policy = sharded_policy(config, CPU)
    return policy, build_optimizer(policy, OptimizerConfig(name=name, learning_rate=rate))


def steps(
    policy: Any, optimizer: Any, pairs: list[ScoredPair], rank: int, world: int, num: int, objective: Any = None
) -> list[float]:
    objective = objective or Objective(sigmoid, couples_pairs=False, beta=0.1)
    losses = []
    for step in range(1, num + 1):
        rows = pack.table_of(pack.rank_batches(pairs, step, 0, world, 500)).to_pylist()
        result = train_step(policy, optimizer, pack.global_batch(rows[rank]), objective, 1.0)
        losses.append(float(result.sums[0]) / len(pairs))
    return losses


def sharded(rank: int, world: int, model: str, folder: str) -> None:
    policy, optimizer = build(model)
    original = load_pretrained(model, "float32", "sdpa").state_dict()
    for name, parameter in policy.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert all(placement.is_shard() for placement in parameter.placements), name
        rows = -(-parameter.shape[0] // world)
        assert parameter.to_local().numel() <= rows * (parameter.numel() // parameter.shape[0])
        assert torch.equal(parameter.full_tensor(), original[name]), name
    pairs = scored_pairs(model)
    losses = steps(policy, optimizer, pairs, rank, world, 3)
    checkpoint.save(folder, policy, optimizer, TrainState(3, 30), attempt=0, keep=2)
    losses += steps(policy, optimizer, pairs, rank, world, 2)

    # Recomputed activations change nothing.
    again = build(model, gradient_checkpointing=True)
    assert steps(*again, pairs, rank, world, 3) == pytest.approx(losses[:3], rel=1e-6)
    # bfloat16 compute on float32 weights: near, not equal; the weights stay float32.
    mixed = build(model, compute_dtype="bfloat16")
    found = steps(*mixed, scored_pairs(model, dtype="bfloat16"), rank, world, 3)
    assert found == pytest.approx(losses[:3], abs=0.02)
    assert {parameter.dtype for parameter in mixed[0].parameters()} == {torch.float32}
    if rank == 0:
        Path(folder, f"losses-{world}.json").write_text(json.dumps(losses))


def test_steps_and_checkpoints_at_other_world_sizes(tmp_path: Path, tiny_model: Path) -> None:
    """Saved after 3 steps at world size 2, loaded at 1, 2 and 3: the next 2 losses are those of the undisturbed run."""
    run_ranks(sharded, 2, tmp_path, str(tiny_model), str(tmp_path))
    expected = json.loads((tmp_path / "losses-2.json").read_text())
    assert expected[0] == pytest.approx(math.log(2), abs=1e-5)
    assert expected[4] < expected[0] - 0.1
    for world in (1, 2, 3):
        run_ranks(resumed, world, tmp_path, str(tiny_model), str(tmp_path), expected[3:])


def resumed(rank: int, world: int, model: str, folder: str, expected: list[float]) -> None:
    policy, optimizer = build(model)
    assert checkpoint.load(folder, "step-00000003", policy, optimizer) == TrainState(3, 30)
    found = steps(policy, optimizer, scored_pairs(model), rank, world, 2)
    if world == 2:
        assert found == expected  # To the bit.
    else:
        assert found == pytest.approx(expected, rel=1e-5)


def small_updates(rank: int, world: int, model: str, folder: str) -> None:
    """Five steps at 1e-6: rounding each update into bfloat16 loses nearly all; Kahan's sum keeps them."""
    pairs = scored_pairs(model, dtype="bfloat16")
    policy, optimizer = build(model, rate=1e-6, weights_dtype="bfloat16", compute_dtype="bfloat16")
    steps(policy, optimizer, pairs, rank, world, 5)
    compensation = [s["kahan_comp"] for s in optimizer.state.values() if "kahan_comp" in s]
    assert len(compensation) == len(list(policy.parameters()))
    kept = torch.cat([c.to_local().abs().flatten().float() for c in compensation])
    # What a weight lost to rounding is kept beside it: five updates of about 1e-6 each.
    assert (kept > 0).float().mean() > 0.5
    assert 1e-7 < kept[kept > 0].median() < 1e-5
    checkpoint.save(folder, policy, optimizer, TrainState(5, 1), attempt=0, keep=1)
    fresh, fresh_optimizer = build(model, rate=1e-6, weights_dtype="bfloat16", compute_dtype="bfloat16")
    checkpoint.load(folder, "step-00000005", fresh, fresh_optimizer)
    assert steps(fresh, fresh_optimizer, pairs, rank, world, 2) == steps(policy, optimizer, pairs, rank, world, 2)


def test_bfloat16_weights_keep_small_updates(tmp_path: Path, tiny_model: Path) -> None:
    run_ranks(small_updates, 2, tmp_path, str(tiny_model), str(tmp_path))


def damaged(rank: int, world: int, model: str, folder: str) -> None:
    policy, optimizer = build(model)
    for step in (1, 2):
        steps(policy, optimizer, scored_pairs(model, 4), rank, world, 1)
        checkpoint.save(folder, policy, optimizer, TrainState(step, 0), attempt=0, keep=5)
    newest = manifest.newest(folder)
    assert newest is not None
    assert newest[0] == "step-00000002"
    shard = next(Path(folder, "checkpoints", "step-00000002").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    fresh = build(model)
    with pytest.raises(CheckpointError, match=shard.name):
        checkpoint.load(folder, "step-00000002", *fresh)
    fallen_back = manifest.newest(folder)
    assert fallen_back is not None
    assert fallen_back[0] == "step-00000001"
    assert checkpoint.load(folder, "step-00000001", *fresh).step == 1


def test_a_flipped_bit_sets_the_checkpoint_aside(tmp_path: Path, tiny_model: Path) -> None:
    run_ranks(damaged, 1, tmp_path, str(tiny_model), str(tmp_path))


def test_manifests(tmp_path: Path) -> None:
    """Without a manifest, or with a broken one, a checkpoint does not exist."""
    run = str(tmp_path)
    assert manifest.newest(run) is None
    for step in (1, 2, 3):
        place = storage.join(run, "checkpoints", manifest.checkpoint_name(step))
        storage.write_bytes(storage.join(place, "shard"), b"x")
        if step < 3:
            state = {"step": step, "num_tokens": 0}
            storage.write_json(storage.join(place, "manifest.json"), {"format": 1, "state": state, "files": {}})
    assert manifest.newest(run) == ("step-00000002", TrainState(2, 0))
    storage.write_bytes(storage.join(run, "checkpoints", "step-00000002", "manifest.json"), b'{"format": 1, "sta')
    assert manifest.newest(run) == ("step-00000001", TrainState(1, 0))
    manifest.prune(run, 1)
    assert manifest.committed(run) == ["step-00000001"]


def exported(rank: int, world: int, model: str, folder: str) -> None:
    policy, _ = build(model)
    state = gathered_state_dict(policy)
    assert (len(state) > 0) == (rank == 0)


def test_whole_weights_come_to_rank_0_only(tmp_path: Path, tiny_model: Path) -> None:
    run_ranks(exported, 2, tmp_path, str(tiny_model), str(tmp_path))
    assert AutoModelForCausalLM.from_pretrained(tiny_model).num_parameters() == 35_072


def sorted_margins(stats: AnswerStats) -> torch.Tensor:
    """A loss that couples pairs: each margin against the reference's margin of the same rank in the batch."""
    chosen, rejected = stats.pairwise(stats.policy_logps)
    assert stats.ref_logps is not None
    ref_chosen, ref_rejected = stats.pairwise(stats.ref_logps)
    difference = torch.sort(chosen - rejected).values - torch.sort(ref_chosen - ref_rejected).values
    return -torch.nn.functional.logsigmoid(0.1 * difference)


def coupled(rank: int, world: int, model: str, folder: str) -> None:
    pairs = scored_pairs(model, 9)
    found = {}
    for name, loss, couples in (
        ("alone", sigmoid, False),
        ("at once", sigmoid, True),
        ("sorted", sorted_margins, True),
    ):
        found[name] = steps(*build(model), pairs, rank, world, 4, Objective(loss, couples, 0.1))
    # A loss that does not couple pairs gives the same either way.
    assert found["at once"] == pytest.approx(found["alone"], rel=1e-6)
    assert abs(found["sorted"][3] - found["alone"][3]) > 1e-4
    if rank == 0:
        Path(folder, f"coupled-{world}.json").write_text(json.dumps(found))


def test_losses_that_couple_pairs_see_the_global_batch(tmp_path: Path, tiny_model: Path) -> None:
    """Sorting needs all pairs of the batch: the same losses with 1 and 2 ranks."""
    for world in (1, 2):
        run_ranks(coupled, world, tmp_path, str(tiny_model), str(tmp_path))
    one, two = (json.loads((tmp_path / f"coupled-{world}.json").read_text()) for world in (1, 2))
    assert two["sorted"] == pytest.approx(one["sorted"], rel=1e-5)
