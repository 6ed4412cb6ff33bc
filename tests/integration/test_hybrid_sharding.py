"""Copies of the weights, each sharded over a group of ranks, against one copy over all: 4 ranks as 2 x 2 over gloo."""

import json
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import run_ranks
from integration.test_sharding import CPU, build, gathered, scored_pairs, sigmoid
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from dpo_ray.pairs import pack
from dpo_ray.training.checkpoint import Checkpointer
from dpo_ray.training.step import Objective, train_step
from dpo_ray.types import TrainState

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
# Some of the norms are above it.
CLIP = 0.55


def steps(made: tuple[Any, Any], model: str, rank: int, world: int, num: int, each: bool = False) -> list[float]:
    """Losses and gradient norms of steps of at least 2 microbatches a rank."""
    pairs, found = scored_pairs(model, 24), list[float]()
    for step in range(1, num + 1):
        row = pack.rank_batches(pairs, step, 0, world, pack.Costs())[rank]
        batch = pack.global_batch(row, 300, pack.Costs())
        assert len(batch.microbatches) >= 2
        result = train_step(*made, batch, Objective(sigmoid, False, 0.1), CLIP, reduce_each=each)
        assert result.grad_norm is not None
        found += [float(result.sums[0]), float(result.grad_norm)]
    return found


def trained(model: str, folder: Path, name: str, rank: int, world: int, **layout: Any) -> None:
    """Three steps, a checkpoint, two more; the numbers and what the checkpoint must hold lie beside it."""
    made = build(model, **layout)
    numbers = steps(made, model, rank, world, 3)
    with Checkpointer(str(folder / name), *made, attempt=0, keep=1) as checkpoints:
        checkpoints.save(TrainState(3, 30))
    whole = gathered(*made)
    if rank == 0:
        save_file(whole, folder / f"{name}.safetensors")
    numbers += steps(made, model, rank, world, 2)
    if rank == 0:
        (folder / f"{name}.json").write_text(json.dumps(numbers))


def resumed(model: str, folder: Path, name: str, rank: int, world: int, **layout: Any) -> None:
    """The bits of the checkpoint, whoever wrote it, and the numbers of the two steps after it."""
    made = build(model, **layout)
    with Checkpointer(str(folder / name), *made, attempt=1, keep=1) as checkpoints:
        assert checkpoints.load("step-00000003") == TrainState(3, 30)
    there, here = load_file(folder / f"{name}.safetensors"), gathered(*made)
    assert there.keys() == here.keys()
    different = [key for key in there if not torch.equal(there[key], here[key])]
    assert not different, f"{name} at {layout}: {different}"
    expected = json.loads((folder / f"{name}.json").read_text())[6:]
    assert steps(made, model, rank, world, 2) == pytest.approx(expected, rel=1e-5)


def written(run: Path) -> Counter[str]:
    """Bytes of tensors in the checkpoint, by the rank whose files they are in."""
    found = Counter[str]()
    for file in (run / "checkpoints" / "step-00000003" / "attempt-0000").glob("*.safetensors"):
        found[file.stem.partition("-")[2]] += sum(tensor.nbytes for tensor in load_file(file).values())
    return found


def alone(rank: int, world: int, model: str, folder: Path, written_by: list[str]) -> None:
    for name in written_by:
        resumed(model, folder, name, rank, world)
    if not written_by:
        trained(model, folder, "one", rank, world)


def grouped(rank: int, world: int, model: str, folder: Path) -> None:
    patience = timedelta(seconds=4321)  # Another than PyTorch's, as Ray Train sets it.
    dist.group.WORLD._get_backend(CPU).set_timeout(patience)  # type: ignore[union-attr]
    trained(model, folder, "2 x 2", rank, world, group=2)
    trained(model, folder, "4", rank, world)
    resumed(model, folder, "4", rank, world, group=2)
    resumed(model, folder, "one", rank, world, group=2)
    resumed(model, folder, "2 x 2", rank, world)
    policy, _ = build(model, group=2)
    for name, parameter in policy.named_parameters():
        # Half of it, and the same half as in the other group.
        assert isinstance(parameter, DTensor)
        groups = parameter.device_mesh.get_all_groups()
        assert [each._get_backend(CPU).options._timeout for each in groups] == [patience] * 2
        assert parameter.to_local().numel() <= -(-parameter.shape[0] // 2) * parameter[:1].numel(), name
    expected = json.loads((folder / "2 x 2.json").read_text())
    for options in ({"group": 2, "each": True}, {"group": 1, "each": True}):
        each = options.pop("each", False)
        found = steps(build(model, **options), model, rank, world, 3, each)
        assert found == pytest.approx(expected[:6], rel=1e-5), options


def test_copies_change_no_number_and_no_checkpoint(tmp_path: Path, tiny_model: Path) -> None:
    """Losses, norms and weights of one rank, of 2 x 2 and of 4; each goes on from what the others wrote."""
    run_ranks(alone, 1, tmp_path, str(tiny_model), tmp_path, [])
    run_ranks(grouped, 4, tmp_path, str(tiny_model), tmp_path)
    run_ranks(alone, 1, tmp_path, str(tiny_model), tmp_path, ["2 x 2"])
    one, groups, four = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "2 x 2", "4"))
    assert one[0] > one[-2] + 0.1
    assert min(one[1::2]) < CLIP < max(one[1::2])
    assert groups == pytest.approx(four, rel=1e-5)
    assert groups == pytest.approx(one, rel=1e-5)
    weights = {name: load_file(tmp_path / f"{name}.safetensors") for name in ("one", "2 x 2", "4")}
    for other in ("one", "4"):
        for key, tensor in weights[other].items():
            torch.testing.assert_close(weights["2 x 2"][key], tensor, rtol=1e-4, atol=1e-5, msg=key)
    # Each of the four writes about a quarter of one copy.
    bytes_of = {name: written(tmp_path / name) for name in weights}
    whole = sum(tensor.nbytes for tensor in weights["one"].values())
    assert [sum(files.values()) for files in bytes_of.values()] == [whole] * 3
    assert len(bytes_of["2 x 2"]) == 4
    assert max(bytes_of["2 x 2"].values()) < 0.3 * whole
