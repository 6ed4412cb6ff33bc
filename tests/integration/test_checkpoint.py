"""Checkpoints of FSDP2 models between real gloo ranks: in the background, through failed writes and damage."""

import json
import os
import pickle
import resource
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import run_ranks
from safetensors import safe_open

from dpo_ray import storage
from dpo_ray.config import ModelConfig, OptimizerConfig
from dpo_ray.errors import CheckpointError, FencedError
from dpo_ray.model.shard import sharded_policy
from dpo_ray.training import checkpoint_files, manifest
from dpo_ray.training.checkpoint import Checkpointer
from dpo_ray.training.checkpoint_tensors import tensors_of
from dpo_ray.training.optimizer import build_optimizer
from dpo_ray.types import TrainState

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@dataclass
class Listening:
    """Hears of commits alone."""

    promise: Callable[[TrainState], None]

    def committed(self, line: dict[str, Any]) -> None:
        pass

    def needs(self, step: int) -> bool:
        return False


def build(model: str) -> tuple[Any, Any]:
    policy = sharded_policy(ModelConfig(path=model, compute_dtype="float32"), torch.device("cpu"))
    return policy, build_optimizer(policy, OptimizerConfig(learning_rate=1e-2))


def step(policy: Any, optimizer: Any) -> None:
    tokens = torch.arange(8)[None]
    policy(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def content(policy: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """This rank's part, copied."""
    tensors = tensors_of(policy, optimizer).items()
    return {name: (t.to_local() if hasattr(t, "to_local") else t).detach().clone() for name, t in tensors}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def newest(run: str) -> str | None:
    found = manifest.newest(run)
    return None if found is None else found[0]


def background(rank: int, world: int, model: str, run: str) -> None:
    policy, optimizer = build(model)
    step(policy, optimizer)
    gate, write = threading.Event(), checkpoint_files.write_safetensors

    def gated(path: str, tensors: dict[str, torch.Tensor]) -> Any:
        assert gate.wait(60)
        return write(path, tensors)

    checkpoint_files.write_safetensors = gated
    committing = []
    checkpoints = Checkpointer(
        run, policy, optimizer, 7, keep=5, listener=Listening(lambda state: committing.append(state.step))
    )
    state = TrainState(1, 10)
    with checkpoints:
        checkpoints.save(state)  # Returns, though nothing can be written yet.
        first = content(policy, optimizer)
        step(policy, optimizer)  # Meanwhile training goes on.
        state.step, state.num_tokens = 2, 20
        assert newest(run) is None
        gate.set()
        checkpoints.save(state)  # Waits for the one before.
        assert manifest.committed(run)[0] == "step-00000001"
        second = content(policy, optimizer)
        step(policy, optimizer)
        checkpoints.save(state)  # It has this step already.
    assert manifest.committed(run) == ["step-00000001", "step-00000002"]
    assert committing == ([1, 2] if rank == 0 else [])

    files = {str(path.relative_to(run)) for path in Path(run, "checkpoints/step-00000002").rglob("*") if path.is_file()}
    within = "checkpoints/step-00000002"
    place, kinds = f"{within}/attempt-0007", ("rank", "optimizer")
    shards = {f"{place}/{kind}-{number:04d}.safetensors" for kind in kinds for number in range(world)}
    assert files == {f"{within}/manifest.json", f"{within}/attempt-0007/layout.json"} | shards
    weight = "model.embed_tokens.weight"
    for kind, own in (("rank", f"model.{weight}@"), ("optimizer", f"optimizer.{weight}.exp_avg@")):
        with safe_open(f"{run}/{place}/{kind}-{rank:04d}.safetensors", framework="pt") as shard:
            assert any(key.startswith(own) for key in shard.keys())  # noqa: SIM118
            assert all(key.startswith(own.partition(".")[0]) for key in shard.keys())  # noqa: SIM118
    assert manifest.read_manifest(run, "step-00000002").world_size == world

    with Checkpointer(run, policy, optimizer, 8, keep=5) as again:
        assert again.load("step-00000001") == TrainState(1, 10)
        assert same(content(policy, optimizer), first)
        again.save(TrainState(1, 10))  # Attempt 8 has it from attempt 7.
        assert again.load("step-00000002") == TrainState(2, 20)
        assert same(content(policy, optimizer), second)
    assert manifest.read_manifest(run, "step-00000001").attempt == 7

    # An error in the loop does not wait for the save: peers may be dead. Waiting would outlast the gate's patience.
    gate.clear()
    failing = Checkpointer(run, policy, optimizer, 9, keep=5)
    with suppress(ZeroDivisionError), failing:
        failing.save(TrainState(3, 30))
        raise ZeroDivisionError
    gate.set()
    failing.wait()


def test_saves_in_the_background(tmp_path: Path, tiny_model: Path) -> None:
    run_ranks(background, 2, tmp_path, str(tiny_model), str(tmp_path / "run"))


def failed_writes(rank: int, world: int, model: str, run: str) -> None:
    policy, optimizer = build(model)
    step(policy, optimizer)
    with Checkpointer(run, policy, optimizer, 0, keep=5) as checkpoints:
        checkpoints.save(TrainState(1, 0))

    def attempt(number: int, message: str, error: type[Exception], **options: Any) -> None:
        failing = Checkpointer(run, policy, optimizer, number, keep=5, **options)
        failing.save(TrainState(2, 0))
        for ask in (failing.wait, lambda: failing.save(TrainState(3, 0))):
            with pytest.raises(error, match=message):
                ask()
        dist.barrier()
        assert newest(run) == "step-00000001"

    # A full disk on one rank: no file may grow to the size of its weights, about 70 kB.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    attempt(1, r"rank-0001\.safetensors: cannot be written: .*File too large", CheckpointError)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not Path(run, "checkpoints/step-00000002/attempt-0001").exists()

    # A file that was written, and is not there.
    def lose(path: str, tensors: dict[str, torch.Tensor]) -> Any:
        record = manifest.FileRecord(9, "")
        if rank == 0:
            record = write(path, tensors)
        return record

    write, checkpoint_files.write_safetensors = checkpoint_files.write_safetensors, lose
    attempt(2, r"rank-0001\.safetensors: missing, 9 bytes were written", CheckpointError)
    checkpoint_files.write_safetensors = write

    def fence(state: TrainState) -> None:
        raise FencedError(f"step {state.step} is another's")

    attempt(3, "step 2 is another's", FencedError, listener=Listening(fence))
    # What cannot be stored is said before anything is written.
    optimizer.state[next(policy.parameters())]["history"] = [1]
    with pytest.raises(CheckpointError, match="history is no tensor"):
        Checkpointer(run, policy, optimizer, 4, keep=5).save(TrainState(2, 0))


def test_a_write_that_fails_on_one_rank_commits_nothing(tmp_path: Path, tiny_model: Path) -> None:
    run_ranks(failed_writes, 2, tmp_path, str(tiny_model), str(tmp_path / "run"))


class Planted:
    """Unpickling it runs code."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def damages(mark: str) -> dict[str, tuple[str, Callable[[Path], None]]]:
    """Per damage: what the message must say, and how to do it to a checkpoint's folder."""

    def shard(folder: Path) -> Path:
        return folder / "attempt-0000" / "rank-0001.safetensors"

    def flip(folder: Path) -> None:
        data = bytearray(shard(folder).read_bytes())
        data[len(data) // 2] ^= 1
        shard(folder).write_bytes(data)

    def plant(folder: Path) -> None:
        """A shard that is a pickle, and a manifest that vouches for it; and where DCP's own readers look."""
        data = pickle.dumps(Planted(mark))
        shard(folder).write_bytes(data)
        for name in (".metadata", "attempt-0000/.metadata"):
            (folder / name).write_bytes(data)
        about = json.loads((folder / "manifest.json").read_text())
        sha256 = storage.sha256_of_file(str(shard(folder)))
        about["files"]["attempt-0000/rank-0001.safetensors"] = {"size": len(data), "sha256": sha256}
        (folder / "manifest.json").write_text(json.dumps(about))

    def vouched_layout(folder: Path) -> None:
        layout = folder / "attempt-0000" / "layout.json"
        layout.write_bytes(pickle.dumps(Planted(mark)))
        about = json.loads((folder / "manifest.json").read_text())
        about["files"]["attempt-0000/layout.json"] = {
            "size": layout.stat().st_size,
            "sha256": storage.sha256_of_file(str(layout)),
        }
        (folder / "manifest.json").write_text(json.dumps(about))

    name = r"attempt-0000/rank-0001\.safetensors: "
    return {
        "flipped bit": (name + "damaged: its SHA-256 differs", flip),
        "missing": (name + "missing", lambda folder: shard(folder).unlink()),
        "truncated": (name + r"damaged: 1000 bytes instead of \d+", lambda folder: os.truncate(shard(folder), 1000)),
        "garbage layout": (
            r"attempt-0000/layout\.json: damaged: 2 bytes instead of \d+",
            lambda folder: (folder / "attempt-0000/layout.json").write_text("{]") and None,
        ),
        "pickled layout": (r"attempt-0000/layout\.json: damaged", vouched_layout),
        "pickle": (name + "damaged: ", plant),
    }


def damaged(rank: int, world: int, model: str, run: str) -> None:
    policy, optimizer = build(model)
    mark = f"{run}-planted"
    cases = list(damages(mark).items())
    with Checkpointer(run, policy, optimizer, 0, keep=99) as checkpoints:
        for number in range(len(cases) + 1):
            step(policy, optimizer)
            checkpoints.save(TrainState(number + 1, 0))
            if number == 0:
                first = content(policy, optimizer)
    for number, (case, (message, damage)) in reversed(list(enumerate(cases, 2))):
        name = manifest.checkpoint_name(number)
        assert newest(run) == name, case
        dist.barrier()
        if rank == 0:
            damage(Path(run, "checkpoints", name))
        dist.barrier()
        with pytest.raises(CheckpointError, match=message):
            Checkpointer(run, policy, optimizer, 1, keep=99).load(name)
        # On all ranks, and set aside by the time that the first one raises.
        folder = Path(run, "checkpoints", name)
        assert not (folder / "manifest.json").exists()
        record = json.loads((folder / "set-aside-0000.json").read_text())
        assert case == "pickled layout" or "rank-0001" in record["reason"] or "layout.json" in record["reason"]
        assert json.loads(record["manifest"])["state"]["step"] == number
    assert newest(run) == "step-00000001"
    with Checkpointer(run, policy, optimizer, 1, keep=99) as checkpoints:
        checkpoints.load("step-00000001")
        assert same(content(policy, optimizer), first)
    assert not Path(mark).exists()

    # A host that reads wrongly takes it from nobody.
    with pytest.MonkeyPatch.context() as patched:
        if rank == 1:
            patched.setattr(storage, "sha256_of_file", lambda path: "wrong")
        with pytest.raises(CheckpointError, match=r"-000\d\.safetensors: damaged: its SHA-256 differs"):
            Checkpointer(run, policy, optimizer, 1, keep=99).load("step-00000001")
    assert newest(run) == "step-00000001"

    # One that does not fit says so, and stays.
    other = torch.optim.RMSprop(policy.parameters())
    with pytest.raises(CheckpointError, match="of another model, adapter or optimizer: optimizer.*exp_avg"):
        Checkpointer(run, policy, other, 1, keep=99).load("step-00000001")
    assert newest(run) == "step-00000001"


def test_damage_is_named_and_set_aside(tmp_path: Path, tiny_model: Path) -> None:
    run_ranks(damaged, 2, tmp_path, str(tiny_model), str(tmp_path / "run"))


def retained(rank: int, world: int, model: str, run: str) -> None:
    """On object storage. Accuracies 0.5, 0.9, 0.7, 0.9, 0.8: the best is step 2, also for a later attempt."""
    policy, optimizer = build(model)
    metric, state = "eval_rewards/accuracies", TrainState()
    step(policy, optimizer)
    for attempt, values in ((0, [0.5, 0.9, 0.7]), (1, [0.9, 0.8])):
        with Checkpointer(run, policy, optimizer, attempt, keep=1, keep_best=metric) as checkpoints:
            if attempt:
                state = checkpoints.load("step-00000003")
            for value in values:
                step(policy, optimizer)
                state.step += 1
                checkpoints.take_best(state, {"step": state.step, metric: value})
                checkpoints.save(state)
    dist.barrier()  # Rank 0 removes old ones after the commit.
    assert manifest.committed(run) == ["step-00000002", "step-00000005"]
    found = manifest.newest(run)
    assert found is not None
    assert found[1].state == TrainState(5, 0, metric, 2, 0.9)
    before = content(policy, optimizer)
    step(policy, optimizer)
    with Checkpointer(run, policy, optimizer, 2, keep=1) as checkpoints:
        checkpoints.load("step-00000005")
    assert same(content(policy, optimizer), before)
    dist.barrier()
    if rank == 0:
        place = storage.join(run, "checkpoints/step-00000005/attempt-0001/rank-0001.safetensors")
        storage.write_bytes(place, storage.read_bytes(place)[:-1])
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"rank-0001\.safetensors: damaged: \d+ bytes instead of"):
        Checkpointer(run, policy, optimizer, 3, keep=1).load("step-00000005")
    assert newest(run) == "step-00000002"


def test_the_best_is_kept_on_s3(tmp_path: Path, tiny_model: Path, s3_server: Any) -> None:
    run_ranks(retained, 2, tmp_path, str(tiny_model), s3_server.uri("kept"))
