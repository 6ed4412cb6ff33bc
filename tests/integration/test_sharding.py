"""FSDP2 over gloo in real processes: sharded weights, the step, and checkpoints at other world sizes."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import plain_logps, run_ranks, tokenized
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from dpo_ray.config import ModelConfig, OptimizerConfig
from dpo_ray.demo_data import byte_tokenizer, make_pairs
from dpo_ray.errors import ConfigError
from dpo_ray.model.load import load_pretrained
from dpo_ray.model.shard import gathered_state_dict, sharded_policy
from dpo_ray.objective.losses import LOSSES, AnswerStats
from dpo_ray.pairs import pack
from dpo_ray.reference.scorer import Scorer
from dpo_ray.training import step as step_module
from dpo_ray.training.checkpoint import Checkpointer
from dpo_ray.training.checkpoint_tensors import tensors_of
from dpo_ray.training.metrics import slowest
from dpo_ray.training.optimizer import build_optimizer
from dpo_ray.training.step import Objective, train_step
from dpo_ray.types import ScoredPair, TrainState

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
CPU = torch.device("cpu")
OTHER_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "rmsprop": {},
    "adamw_kahan": {"weights_dtype": "bfloat16", "compute_dtype": "bfloat16"},
}


def sigmoid(stats: AnswerStats) -> torch.Tensor:
    return LOSSES["sigmoid"].fn(stats, beta=0.1, label_smoothing=0.0)


def scored_pairs(model: str, num: int = 10, dtype: str = "float32") -> list[ScoredPair]:
    pairs = tokenized(make_pairs(num, seed=2), byte_tokenizer())
    scores = Scorer(model, dtype, "sdpa", 500, CPU).score(pairs)
    return [ScoredPair(pair, score) for pair, score in zip(pairs, scores, strict=True)]


def build(
    model: str, rate: float = 1e-2, name: Any = "adamw", group: int | None = None, **options: Any
) -> tuple[Any, Any]:
    config = ModelConfig(**{"path": model, "compute_dtype": "float32", **options})
    policy = sharded_policy(config, CPU, group=group)
    return policy, build_optimizer(policy, OptimizerConfig(name=name, learning_rate=rate))


def steps(
    policy: Any, optimizer: Any, pairs: list[ScoredPair], rank: int, world: int, num: int, objective: Any = None
) -> list[float]:
    objective = objective or Objective(sigmoid, couples_pairs=False, beta=0.1)
    losses = []
    for step in range(1, num + 1):
        rows = pack.table_of(pack.rank_batches(pairs, step, 0, world, pack.Costs())).to_pylist()
        result = train_step(policy, optimizer, pack.global_batch(rows[rank], 500, pack.Costs()), objective, 1.0)
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
    saved(folder, "adamw", policy, optimizer, rank)
    losses += steps(policy, optimizer, pairs, rank, world, 2)
    for name, options in OTHER_OPTIMIZERS.items():
        other = build(model, name=name, **options)
        whole = load_pretrained(model, options.get("weights_dtype", "float32"), "sdpa")
        # Rotary frequencies rounded to bfloat16 would be another model.
        for key, buffer in whole.named_buffers():
            torch.testing.assert_close(other[0].get_buffer(key), buffer, rtol=0, atol=0)
        steps(*other, scored_pairs(model, dtype=options.get("compute_dtype", "float32")), rank, world, 2)
        saved(folder, name, *other, rank)

    # bfloat16 compute on float32 weights: near, not equal; the weights stay float32.
    mixed = build(model, compute_dtype="bfloat16")
    found = steps(*mixed, scored_pairs(model, dtype="bfloat16"), rank, world, 3)
    assert found == pytest.approx(losses[:3], abs=0.02)
    assert {parameter.dtype for parameter in mixed[0].parameters()} == {torch.float32}
    if rank == 0:
        Path(folder, f"losses-{world}.json").write_text(json.dumps(losses))


def alike(rank: int, world: int, model: str, others: list[dict[str, Any]]) -> None:
    pairs = scored_pairs(model)
    expected = steps(*build(model), pairs, rank, world, 3)
    for options in others:
        assert steps(*build(model, **options), pairs, rank, world, 3) == pytest.approx(expected, rel=1e-6), options


@pytest.mark.parametrize(
    "others",
    [
        pytest.param(
            [{"gradient_checkpointing": True}, {"gradient_checkpointing": "offload"}, {"cpu_offload": True}],
            id="where things are kept and what is computed again",
        ),
        pytest.param([{"compile": True}], id="what is compiled", marks=pytest.mark.slow),
    ],
)
def test_no_number_depends_on(tmp_path: Path, tiny_model: Path, others: list[dict[str, Any]]) -> None:
    run_ranks(alike, 2, tmp_path, str(tiny_model), others)


def with_a_slow_rank(rank: int, world: int, model: str) -> None:
    policy, optimizer = build(model)
    pairs = scored_pairs(model)
    block = policy.model.layers[1].mlp  # In the block that is measured.
    forward = block.forward
    if rank == 1:
        block.forward = lambda hidden: (time.sleep(0.1), forward(hidden))[1]
    found = []
    for step in range(1, 4):
        rows = pack.table_of(pack.rank_batches(pairs, step, 0, world, pack.Costs())).to_pylist()
        batch = pack.global_batch(rows[rank], 500, pack.Costs())
        result = train_step(policy, optimizer, batch, Objective(sigmoid, False, 0.1), 1.0)
        found.append(result.rank_s.tolist())
        with torch.no_grad():
            policy.token_scores(batch.microbatches[0].tokens, batch.microbatches[0].lengths)
    # Each line has the step before; a pass that is not to train is none of it.
    assert found[0] == [0.0, 0.0]
    for before, after in found[1:]:
        slept = 0.1 * len(batch.microbatches)
        assert 0 < before < slept <= after
        assert slowest([before, after])["perf/slowest_rank"] == 1


def test_a_slow_rank_is_found_though_the_others_wait_for_it(tmp_path: Path, tiny_model: Path) -> None:
    run_ranks(with_a_slow_rank, 2, tmp_path, str(tiny_model))


def saved(folder: str, run: str, policy: Any, optimizer: Any, rank: int) -> None:
    """A checkpoint, and beside it what it must hold."""
    with Checkpointer(f"{folder}/{run}", policy, optimizer, attempt=0, keep=2) as checkpoints:
        checkpoints.save(TrainState(3, 30))
    whole = gathered(policy, optimizer)
    if rank == 0:
        save_file(whole, f"{folder}/{run}.safetensors")


def gathered(policy: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    tensors = tensors_of(policy, optimizer).items()
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for name, t in tensors}


def test_steps_and_checkpoints_at_other_world_sizes(tmp_path: Path, tiny_model: Path) -> None:
    """Saved after 3 steps at world size 2, loaded at 1 to 4: the same bits of weights and optimizer.

    And the next 2 losses are those of the undisturbed run.
    """
    run_ranks(sharded, 2, tmp_path, str(tiny_model), str(tmp_path))
    expected = json.loads((tmp_path / "losses-2.json").read_text())
    assert expected[0] == pytest.approx(math.log(2), abs=1e-5)
    assert expected[4] < expected[0] - 0.1
    for world in (1, 2, 3, 4):
        run_ranks(resumed, world, tmp_path, str(tiny_model), str(tmp_path), expected[3:])


def resumed(rank: int, world: int, model: str, folder: str, expected: list[float]) -> None:
    for name, options in {**OTHER_OPTIMIZERS, "adamw": {}}.items():
        policy, optimizer = build(model, name=name, **options)
        with Checkpointer(f"{folder}/{name}", policy, optimizer, attempt=1, keep=2) as checkpoints:
            assert checkpoints.load("step-00000003") == TrainState(3, 30)
        there, here = load_file(f"{folder}/{name}.safetensors"), gathered(policy, optimizer)
        assert there.keys() == here.keys()
        assert all(torch.equal(there[key], here[key]) and there[key].dtype == here[key].dtype for key in there)
    assert len(here) == 4 * len(list(policy.parameters()))  # Weight, two moments and a count of steps.
    found = steps(policy, optimizer, scored_pairs(model), rank, world, 2)
    if world == 2:
        assert found == expected  # To the bit.
    else:
        assert found == pytest.approx(expected, rel=1e-5)


def small_updates(rank: int, world: int, model: str, folder: str) -> None:
    """Five steps at 1e-6: rounding each update into bfloat16 loses nearly all; Kahan's sum keeps them."""
    pairs = scored_pairs(model, dtype="bfloat16")
    policy, optimizer = build(model, rate=1e-6, name="adamw_kahan", **OTHER_OPTIMIZERS["adamw_kahan"])
    steps(policy, optimizer, pairs, rank, world, 5)
    compensation = [s["kahan_comp"] for s in optimizer.state.values() if "kahan_comp" in s]
    assert len(compensation) == len(list(policy.parameters()))
    kept = torch.cat([c.to_local().abs().flatten().float() for c in compensation])
    # What a weight lost to rounding is kept beside it: five updates of about 1e-6 each.
    assert (kept > 0).float().mean() > 0.5
    assert 1e-7 < kept[kept > 0].median() < 1e-5
    with Checkpointer(folder, policy, optimizer, attempt=0, keep=1) as checkpoints:
        checkpoints.save(TrainState(5, 1))
    again = build(model, rate=1e-6, name="adamw_kahan", **OTHER_OPTIMIZERS["adamw_kahan"])
    with Checkpointer(folder, *again, attempt=1, keep=1) as checkpoints:
        checkpoints.load("step-00000005")
    assert steps(*again, pairs, rank, world, 2) == steps(policy, optimizer, pairs, rank, world, 2)


def test_bfloat16_weights_keep_small_updates(tmp_path: Path, tiny_model: Path) -> None:
    run_ranks(small_updates, 2, tmp_path, str(tiny_model), str(tmp_path))


def exported(rank: int, world: int, model: str, folder: str) -> None:
    policy, _ = build(model)
    state = gathered_state_dict(policy)
    assert (len(state) > 0) == (rank == 0)


def test_whole_weights_come_to_rank_0_only(tmp_path: Path, tiny_model: Path) -> None:
    run_ranks(exported, 2, tmp_path, str(tiny_model), str(tmp_path))
    assert AutoModelForCausalLM.from_pretrained(tiny_model).num_parameters() == 35_072


def sorted_margins(stats: AnswerStats) -> torch.Tensor:
    return LOSSES["aot"].fn(stats, beta=0.1, label_smoothing=0.0)


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


def summed_each(rank: int, world: int, model: str) -> None:
    pairs = scored_pairs(model, 24)
    found, sums = [], list[bool]()
    set_sync = step_module.set_gradient_sync
    step_module.set_gradient_sync = lambda policy, sync, last: (sums.append(sync), set_sync(policy, sync, last))
    for reduce_each in (False, True):
        policy, optimizer = build(model)
        for step in range(1, 5):
            row = pack.rank_batches(pairs, step, 0, world, pack.Costs())[rank]
            batch = pack.global_batch(row, 300, pack.Costs())
            assert len(batch.microbatches) >= 3
            sums.clear()
            result = train_step(policy, optimizer, batch, Objective(sigmoid, False, 0.1), 1.0, reduce_each=reduce_each)
            assert sums == [reduce_each] * (len(batch.microbatches) - 1) + [True]
            assert result.grad_norm is not None
            found += [float(result.sums[0]), float(result.grad_norm)]
    once, each = found[:8], found[8:]
    assert once[0] > once[-2]
    assert each == pytest.approx(once, rel=1e-5)


def test_when_gradients_are_summed_does_not_matter(tmp_path: Path, tiny_model: Path) -> None:
    """After each of several microbatches, or once after the last."""
    run_ranks(summed_each, 2, tmp_path, str(tiny_model))


FROZEN = ["embed_tokens", r"^model[.]layers[.]0[.]"]


def frozen(rank: int, world: int, model: str, folder: str) -> None:
    pairs = scored_pairs(model)
    policy, optimizer = build(model, freeze=FROZEN)
    losses = steps(policy, optimizer, pairs, rank, world, 3)
    plain = load_pretrained(model, "float32", "eager")
    trained = [p for name, p in plain.named_parameters() if "embed_tokens" not in name and "layers.0." not in name]
    plain_optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for loss in losses:
        each = [plain_logps(plain, pair.pair) - torch.from_numpy(pair.ref_logps) for pair in pairs]
        expected = torch.stack([-torch.nn.functional.logsigmoid(0.1 * (h[0] - h[1])) for h in each]).mean()
        assert loss == pytest.approx(expected.item(), abs=1e-5)
        expected.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        plain_optimizer.step()
        plain.zero_grad()
    start = load_pretrained(model, "float32", "sdpa").state_dict()
    for name, parameter in policy.named_parameters():
        same = torch.equal(parameter.full_tensor(), start[name])
        assert same == (not parameter.requires_grad) == ("embed_tokens" in name or "layers.0." in name), name
    # Blocks that are computed again from inputs without gradient.
    for options in ({"gradient_checkpointing": True}, {"gradient_checkpointing": "offload"}):
        other = build(model, freeze=FROZEN, **options)
        assert steps(*other, pairs, rank, world, 3) == pytest.approx(losses, rel=1e-6), options
    with Checkpointer(folder, policy, optimizer, attempt=0, keep=1) as checkpoints:
        checkpoints.save(TrainState(3, 10))
    again = build(model, freeze=FROZEN)
    with Checkpointer(folder, *again, attempt=1, keep=1) as checkpoints:
        checkpoints.load("step-00000003")
    assert all(
        torch.equal(p.full_tensor(), again[0].get_parameter(name).full_tensor())
        for name, p in policy.named_parameters()
    )
    with pytest.raises(ConfigError, match="'head_only' occurs in no name of a weight of LlamaForCausalLM; the first a"):
        build(model, freeze=["head_only"])
    with pytest.raises(ConfigError, match="that is every weight, and nothing is left to train"):
        build(model, freeze=["."])


def test_frozen_weights_stay(tmp_path: Path, tiny_model: Path) -> None:
    """The others follow a plain loop that does not train them either."""
    run_ranks(frozen, 2, tmp_path, str(tiny_model), str(tmp_path / "run"))
