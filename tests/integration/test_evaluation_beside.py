"""Evaluations beside training: the workers' own numbers, each once, whatever happens to those who evaluate."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import chunk_table, read_lines, run_ranks, steps_of, tiny_config, tokenized, write_pairs

from dpo_ray import train
from dpo_ray.config import Config, parse_config
from dpo_ray.demo_data import byte_tokenizer, make_pairs
from dpo_ray.errors import CheckpointError
from dpo_ray.model.shard import sharded_policy
from dpo_ray.orchestration import evaluator
from dpo_ray.orchestration.stream import Places, eval_feeds, make_feed
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.pairs import store
from dpo_ray.pairs.pack import Costs
from dpo_ray.reference.scorer import Scorer
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.training import evaluations, manifest
from dpo_ray.training.checkpoint import Checkpointer, read_policy
from dpo_ray.training.checkpoint_tensors import make_state
from dpo_ray.training.evaluate import evaluate
from dpo_ray.training.optimizer import build_optimizer
from dpo_ray.training.step import objective_of
from dpo_ray.types import Attempt, TokenizedPair, TrainState

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]
STEPS, EVERY = 9, 3


class Listener(Watcher):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.phases, self.warnings, self.evaluations = list[str](), list[str](), list[dict[str, Any]]()

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def line(self, line: dict[str, Any]) -> None:
        if "eval_loss" in line:
            self.evaluations.append(line)


def config_of(tmp_path: Path, model: Path, place: str, **sections: dict[str, Any]) -> Config:
    """Two workers, two held-out sets; checkpoints of evaluations are not those that are due anyway."""
    base: dict[str, dict[str, Any]] = {
        "data": {
            "train": [str(tmp_path / "pairs.jsonl")],
            "eval": {"one": [str(tmp_path / "one.jsonl")], "two": [str(tmp_path / "two.jsonl")]},
            "eval_fraction": 0.0,
        },
        "scaling": {"workers": 2},
        "train": {
            "max_steps": STEPS,
            "eval_every_steps": EVERY,
            "eval_place": place,
            "checkpoint_every_steps": 100,
            "keep_checkpoints": 1,
            "keep_best": "eval_loss",
        },
    }
    merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in {*base, *sections}}
    return tiny_config(str(tmp_path / "storage"), place, model, "", **merged)


def evaluations_of(run_uri: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(Path(run_uri, "metrics.jsonl")) if "eval_loss" in line]


def assert_alike(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, by_workers in zip(found, expected, strict=True):
        assert line.keys() == by_workers.keys()
        assert line | {"eval_perf/seconds": 0} == pytest.approx(
            by_workers | {"eval_perf/seconds": 0}, rel=1e-5, abs=1e-5
        )


@contextlib.contextmanager
def killed_once(monkeypatch: pytest.MonkeyPatch, token: Path) -> Iterator[None]:
    """The replica that evaluates kills itself after its first batch, once."""
    score = evaluator.EvaluationReplica.score
    token.touch()

    def scored(self: Any, checkpoint: Any) -> None:
        moved, calls = self._moved, list[int]()

        def counted() -> None:
            moved()
            calls.append(1)
            # Waiting, the first batch, waiting.
            if len(calls) == 4 and token.exists():
                token.unlink()
                os.kill(os.getpid(), signal.SIGKILL)

        self._moved = counted
        score(self, checkpoint)
        self._moved = moved

    # Pickled by value, so that the actor has it too.
    scored.__module__ = "__main__"
    changed = type("Killed", (evaluator.EvaluationReplica,), {"score": scored, "__module__": "__main__"})
    monkeypatch.setattr(evaluator, "EvaluationReplica", changed)
    yield


@pytest.fixture
def expected(local_ray: None, tmp_path: Path, tiny_model: Path) -> list[dict[str, Any]]:
    """The evaluations by the workers."""
    write_pairs(tmp_path / "pairs.jsonl", 12 * STEPS)
    write_pairs(tmp_path / "one.jsonl", 20, held_out=True)
    write_pairs(tmp_path / "two.jsonl", 11, held_out=True)
    found = evaluations_of(train(config_of(tmp_path, tiny_model, "workers")).run_uri)
    assert [line["step"] for line in found] == [3, 6, 9]
    return found


def test_the_numbers_of_the_workers(expected: list[dict[str, Any]], tmp_path: Path, tiny_model: Path) -> None:
    """By another number of ranks, in packs of another size; and the same training."""
    listener = Listener()
    actors = train(config_of(tmp_path, tiny_model, "actors"), listener)
    found = evaluations_of(actors.run_uri)
    assert_alike(found, expected)
    assert listener.evaluations == found
    assert actors.eval_metrics == found[-1]
    assert listener.warnings == []
    ours, theirs = (steps_of(tmp_path / "storage" / place) for place in ("actors", "workers"))
    assert [each["loss"] for each in ours] == [each["loss"] for each in theirs]
    # The newest, and the best, which was known when later ones had been written.
    best = min(expected, key=lambda line: line["eval_loss"])["step"]
    assert {manifest.step_of(name) for name in manifest.committed(actors.run_uri)} == {best, STEPS}


@pytest.mark.faults
def test_a_replica_that_dies(
    expected: list[dict[str, Any]], tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an evaluation; then a driver that finds evaluations that nobody has recorded."""
    listener, token = Listener(), tmp_path / "token"
    with killed_once(monkeypatch, token):
        actors = train(config_of(tmp_path, tiny_model, "actors"), listener)
    assert not token.exists()
    found = evaluations_of(actors.run_uri)
    assert_alike(found, expected)
    assert listener.warnings == [
        "a replica of the evaluation was lost over step-00000003: its process died; another takes its place"
    ]
    again = Listener()
    assert train(config_of(tmp_path, tiny_model, "actors"), again) == actors
    assert again.phases == [f"{actors.run_uri} is finished: nothing to do"]
    metrics, attempts = (Path(actors.run_uri, name) for name in ("metrics.jsonl", "attempts.jsonl"))
    kept = [line for line in metrics.read_text().splitlines(keepends=True) if '"eval_loss"' not in line]
    metrics.write_text("".join(kept))
    before = attempts.read_text()
    assert train(config_of(tmp_path, tiny_model, "actors"), again).eval_metrics == found[-1]
    assert evaluations_of(actors.run_uri) == found
    assert attempts.read_text() == before


class Here(evaluator.EvaluationReplica):
    """One that computes in a process which is in a group already."""

    def _join(self, rendezvous: str, alone: bool) -> torch.device:
        return torch.device("cpu")


def evaluated(rank: int, world: int, cases: list[tuple[dict[str, Any], Places]]) -> None:
    for raw, places in cases:
        evaluated_one(rank, world, parse_config(raw), places)
    if rank == 0:
        damaged(parse_config(cases[0][0]))


def damaged(config: Config) -> None:
    """A damaged checkpoint is none any more; but not when it is another attempt's than the one that was looked for."""
    run, name = config.run_uri, manifest.checkpoint_name(4)
    policy = torch.nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match="its model is of another model"):
        read_policy(run, name, 3, policy)
    Path(manifest.checkpoint_uri(run, name), "attempt-0003", "layout.json").write_text("{}")
    for attempt, there in ((2, [name]), (3, [])):
        with pytest.raises(CheckpointError, match="layout.json: damaged"):
            read_policy(run, name, attempt, policy)
        assert manifest.committed(run) == there
    with pytest.raises(CheckpointError, match="manifest.json"):
        read_policy(run, name, 3, policy)


def evaluated_one(rank: int, world: int, config: Config, places: Places) -> None:
    """Weights that no start has: what the replica says of their checkpoint, and the evaluation of the model itself."""
    policy = sharded_policy(config.model, torch.device("cpu"), config.adapter, config.seed)
    noise = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                local = parameter.to_local()
                local.add_(0.05 * torch.randn(local.shape, generator=noise))
    optimizer = build_optimizer(policy, config.optimizer, config.model.compute_dtype)
    make_state(optimizer)
    state = TrainState(4, mean_reward=0.25)
    with Checkpointer(config.run_uri, policy, optimizer, attempt=3, keep=1) as checkpoints:
        checkpoints.save(state)
    # Twice the weights, which nobody fetches who does not train.
    folder = Path(manifest.checkpoint_uri(config.run_uri, manifest.checkpoint_name(4)), "attempt-0003")
    (folder / f"optimizer-{rank:04d}.safetensors").unlink()
    made = evaluations.Made(4, 3)
    replica = Here(config, places, rank)
    replica.load("")
    replica.score(evaluator._Checkpoint(made))
    dist.barrier()
    feeds = eval_feeds(config, *make_feed(config, places, Attempt(3, 1, 0, None, world, "", "")))
    pairs = evaluator._HeldOut(feeds, rank, world, lambda: None)
    expected = evaluate(policy, pairs, objective_of(config.objective).at(state), 4, 700)
    found = evaluations.read(config.run_uri, made)
    assert found | {"eval_perf/seconds": 0} == pytest.approx(expected | {"eval_perf/seconds": 0}, rel=1e-6)
    untouched = sharded_policy(config.model, torch.device("cpu"), config.adapter, config.seed)
    start = evaluate(untouched, pairs, objective_of(config.objective).at(state), 4, 700)
    assert abs(start["eval_loss"] - found["eval_loss"]) > 1e-3


OWN = {"adapter": {"rank": 4}, "reference": {"place": "adapter_off"}}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "adapter": {"adapter": {"rank": 4}},
    "adapter-off": OWN,
    "weights-of-the-policy": {"objective": {"weighting": "wpo"}},
    "mean-reward": {"objective": {"loss": "bco_pair"}},
    "coupled-pairs": {"objective": {"loss": "aot"}},
    "scores-of-tokens": {"objective": {"ld_alpha": 0.5}},
    "no-reference": {"objective": {"loss": "sft"}},
}
if importlib.util.find_spec("bitsandbytes"):
    CASES["quantized"] = {**OWN, "adapter": {"rank": 4, "quantize": "nf4"}}


def test_whatever_is_trained(tmp_path: Path, tiny_model: Path) -> None:
    """On two devices, the numbers of the policy itself: adapters, losses that scores alone do not give."""
    rows = tokenized(list(make_pairs(20, seed=1)), byte_tokenizer())
    pairs = sorted((row for row in rows if isinstance(row, TokenizedPair)), key=lambda pair: pair.pair_id)
    uri = str(tmp_path / "pairs")
    chunks = [
        store.write_chunk(uri, store.chunk_name(part, 0), chunk_table(own))
        for part, own in (("train", pairs[:10]), ("eval", pairs[10:]))
    ]
    counts = {**dict.fromkeys(store.COUNTS, 0), "rows": 20, "pairs": 10, "eval_pairs": 10}
    store.write_manifest(store.PairStore(uri, (chunks[0],), (chunks[1],), counts), {})
    cases = []
    for name, sections in CASES.items():
        reference = {"devices_per_replica": 2, "tokens_per_microbatch": 700, **sections.get("reference", {})}
        trained = {"eval_place": "actors", "eval_every_steps": 4, "global_batch_pairs": 4}
        options = {**sections, "reference": reference, "train": trained}
        config = tiny_config(str(tmp_path), name, tiny_model, "pairs", **options)
        scores = ReferenceStore(str(tmp_path / "scores" / name))
        if config.needs_reference and config.reference.place == "actors":
            per_token = config.needs_token_scores
            scorer = Scorer(str(tiny_model), "float32", "sdpa", 700, torch.device("cpu"), per_token=per_token)
            scores.put(chunks[1], [pair.pair_id for pair in pairs[10:]], scorer.score(pairs[10:]))
        places = Places(uri, scores.uri if config.needs_reference else None, Costs(), str(tmp_path / "no-error"))
        cases.append((config.model_dump(mode="json"), places))
    run_ranks(evaluated, 2, tmp_path, cases)
