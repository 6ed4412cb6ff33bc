"""The reference as a service: whoever scores, however often it fails, the numbers are those of the plain model."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from helpers import (
    dpo_ray_command,
    plain_logps,
    run_ranks,
    steps_of,
    stored_scores,
    tiny_config,
    tokenized,
    write_pairs,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

from dpo_ray import storage, train
from dpo_ray.cli import app
from dpo_ray.config import Config, to_yaml
from dpo_ray.demo_data import byte_tokenizer, tiny_llama_config
from dpo_ray.errors import ConfigError, DataError, ReferenceFillError
from dpo_ray.model.files import load_tokenizer
from dpo_ray.orchestration import replicas
from dpo_ray.orchestration.prepare import prepare
from dpo_ray.orchestration.reference_filler import (
    Filled,
    ReferenceFiller,
    chunks_in_order_of_need,
    open_reference_store,
)
from dpo_ray.orchestration.reference_job import fill_reference
from dpo_ray.orchestration.stream import make_plan
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.pairs.store import PairStore, read_chunk
from dpo_ray.reference.scorer import Scorer
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.types import TokenizedPair

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
NUM_PAIRS = 150
CPU = torch.device("cpu")


class Listener(Watcher):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings = list[str]()

    def warning(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def pairs_file(tmp_path: Path) -> str:
    return write_pairs(tmp_path / "pairs.jsonl", NUM_PAIRS)


def config_of(tmp_path: Path, name: str, model: Path, pairs_file: str, **sections: dict[str, Any]) -> Config:
    """Chunks of few pairs: three for each of several replicas."""
    data = {"train": [pairs_file], "eval_fraction": 0.1, "chunk_pairs": 16}
    return tiny_config(str(tmp_path / "storage"), name, model, pairs_file, **{"data": data, **sections})


def reference_of(config: Config) -> ReferenceStore:
    """The store of a run whose pairs are prepared."""
    return open_reference_store(config, prepare(config).uri)


def plain_scores(model: Path, pairs: PairStore) -> dict[bytes, list[float]]:
    """One answer at a time through the model's own forward."""
    every = [pair for chunk in (*pairs.train, *pairs.eval) for pair in read_chunk(pairs.uri, chunk)]
    return {pair.pair_id: scores for pair, scores in zip(every, _plain(model, every), strict=True)}


def plain_rows(model: Path, pairs_file: str) -> list[tuple[dict[str, str], list[tuple[float, int]]]]:
    """The rows of a file, each with the score and the tokens of its answers."""
    rows = [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]
    pairs = [pair for pair in tokenized(rows, load_tokenizer(str(model))) if isinstance(pair, TokenizedPair)]
    scores = _plain(model, pairs)
    return [
        (row, list(zip(each, map(len, pair.answers), strict=True)))
        for row, each, pair in zip(rows, scores, pairs, strict=True)
    ]


def _plain(model: Path, pairs: Sequence[TokenizedPair]) -> list[list[float]]:
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return [plain_logps(plain, pair).tolist() for pair in pairs]


def assert_close(found: dict[bytes, list[float]], expected: dict[bytes, list[float]]) -> None:
    assert found.keys() == expected.keys()
    for pair, scores in found.items():
        assert scores == pytest.approx(expected[pair], rel=1e-5)


@contextlib.contextmanager
def planted(path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> Iterator[None]:
    """Each replica that begins a chunk does this to itself, as often as files are left in a folder."""
    score = replicas.ReferenceReplica.score

    def scored(self: replicas.ReferenceReplica, chunk: Any) -> int:
        for token in path.iterdir():
            with contextlib.suppress(FileNotFoundError):
                token.unlink()
                os.kill(os.getpid(), getattr(signal, what))
        return score(self, chunk)

    # Pickled by value, so that the actors have it too.
    scored.__module__ = "__main__"
    changed = type("Planted", (replicas.ReferenceReplica,), {"score": scored, "__module__": "__main__"})
    monkeypatch.setattr(replicas, "ReferenceReplica", changed)
    yield


@pytest.mark.parametrize(
    "options",
    [{}, {"replicas": {"min": 1, "max": 3}, "tokens_per_microbatch": 500}, {"devices_per_replica": 2}],
    ids=["one", "three", "sharded"],
)
def test_any_pool_gives_the_same_scores(
    local_ray: None, tmp_path: Path, tiny_model: Path, pairs_file: str, options: dict[str, Any]
) -> None:
    config = config_of(tmp_path, "run", tiny_model, pairs_file, reference=options)
    filled, _ = fill_reference(config)
    assert (filled.scored_pairs, filled.left_pairs, filled.lost_replicas) == (NUM_PAIRS, 0, 0)
    assert filled.started_replicas == (3 if "replicas" in options else 1)
    pairs = prepare(config)
    assert_close(stored_scores(config, pairs), plain_scores(tiny_model, pairs))
    again, _ = fill_reference(config)
    assert (again.hit_pairs, again.scored_pairs, again.started_replicas) == (NUM_PAIRS, 0, 0)
    assert storage.list_names(reference_of(config).uri + "/claims") == []


def trained(filler: ReferenceFiller, step: int, pairs_per_s: float) -> None:
    """A step's line of metrics, of a trainer that need not wait."""
    filler.trained({"step": step, "perf/step_s": 1.0, "perf/data_wait_s": 0.0, "perf/pairs_per_s": pairs_per_s})


def test_the_pool_follows_the_trainer(
    local_ray: None, tmp_path: Path, tiny_model: Path, pairs_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three replicas, one when the trainer is slow and the scores far ahead, three again when it is fast."""
    scored, hold, calls = replicas.ReferenceReplica.score, tmp_path / "hold", tmp_path / "calls"
    calls.mkdir()

    def slow(self: replicas.ReferenceReplica, chunk: Any) -> int:
        (calls / f"{chunk.key}-{time.monotonic_ns()}").touch()
        # Nothing is done while the test looks at the pool, however long actors take to start.
        while hold.exists():
            time.sleep(0.02)
        time.sleep(0.25)
        return scored(self, chunk)

    def alive(count: int) -> bool:
        filler.check()
        states = [actor["State"] for actor in ray._private.state.actors().values() if actor["ActorClassName"] == name]
        return states.count("ALIVE") == count == filler.filled.replicas == len(states) - states.count("DEAD")

    def until(seen: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not seen():
            assert time.monotonic() < deadline, filler.filled
            time.sleep(0.05)

    name = "Follower"
    slow.__module__ = "__main__"
    changed = type(name, (replicas.ReferenceReplica,), {"score": slow, "__module__": "__main__"})
    monkeypatch.setattr(replicas, "ReferenceReplica", changed)
    options = {"replicas": {"min": 1, "max": 3}}
    config = config_of(tmp_path, "run", tiny_model, pairs_file, reference=options, data={"chunk_pairs": 2})
    pairs = prepare(config)
    order = chunks_in_order_of_need(config, make_plan(config, pairs), pairs, 0)
    filler = ReferenceFiller(config, pairs, order, open_reference_store(config, pairs.uri), "family", 1)
    hold.touch()
    filler.start()
    try:
        # One that still loads would not be let go.
        until(lambda: alive(3) and len(list(calls.iterdir())) == 3)
        trained(filler, 1, 0.01)
        hold.unlink()
        until(lambda: alive(1))
        hold.touch()
        left = filler.filled.left_pairs
        assert left > 20
        assert alive(1)
        # It has caught up with the scores, and takes them as fast as they come.
        trained(filler, (NUM_PAIRS - left) // config.train.global_batch_pairs, 1000.0)
        until(lambda: alive(3))
        hold.unlink()
        until(lambda: not filler.working() and alive(0))
    finally:
        hold.unlink(missing_ok=True)
        filler.stop()
    filler.check()
    filled = filler.filled
    assert (filled.scored_pairs, filled.left_pairs, filled.lost_replicas) == (NUM_PAIRS, 0, 0)
    assert (filled.started_replicas, filled.most_replicas) == (5, 3)
    assert sorted(path.name.rpartition("-")[0] for path in calls.iterdir()) == sorted(chunk.key for chunk in order)
    assert_close(stored_scores(config, pairs), plain_scores(tiny_model, pairs))


def test_two_runs_score_each_pair_once(local_ray: None, tmp_path: Path, tiny_model: Path, pairs_file: str) -> None:
    """Both begin with an empty store; what one scores the other waits for."""
    prepare(config_of(tmp_path, "first", tiny_model, pairs_file))
    done: dict[str, Filled] = {}

    def fill(name: str, seed: int) -> None:
        config = config_of(tmp_path, name, tiny_model, pairs_file).model_copy(update={"seed": seed})
        done[name], _ = fill_reference(config)

    threads = [threading.Thread(target=fill, args=(f"run{seed}", seed)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(filled.scored_pairs for filled in done.values()) == NUM_PAIRS
    for filled in done.values():
        assert filled.hit_pairs + filled.scored_pairs + filled.elsewhere_pairs == NUM_PAIRS


@pytest.mark.faults
@pytest.mark.slow
def test_refused_files_are_scored_again(local_ray: None, tmp_path: Path, tiny_model: Path, pairs_file: str) -> None:
    """A flipped byte, another chunk's scores, a cut file: the run says so, and ends as if nothing had been."""
    twin = train(config_of(tmp_path, "twin", tiny_model, pairs_file))
    config = config_of(tmp_path, "run", tiny_model, pairs_file)
    folder = Path(reference_of(config).uri)
    first, second, third, fourth, *_ = sorted(folder.glob("*.parquet"))
    flipped = bytearray(first.read_bytes())
    flipped[40] ^= 255
    first.write_bytes(flipped)
    second.write_bytes(fourth.read_bytes())
    third.write_bytes(third.read_bytes()[:-20])
    listener = Listener()
    result = train(config, listener)
    said = "\n".join(listener.warnings)
    for path, reason in ((first, "damaged"), (second, "holds scores of other pairs"), (third, "damaged")):
        assert re.search(rf"{path.name}: {reason}.*: it is scored again", said)
    assert not list((folder / "refused").iterdir())
    losses = [[line["loss"] for line in steps_of(Path(each.run_uri))] for each in (result, twin)]
    assert losses[0] == losses[1]


def test_store_only(local_ray: None, tmp_path: Path, tiny_model: Path, pairs_file: str) -> None:
    config = config_of(tmp_path, "run", tiny_model, pairs_file, reference={"place": "store_only"})
    with pytest.raises(ConfigError, match=r"reference.place is store_only, but (\d+) of \1 chunks have no scores"):
        train(config)
    fill_reference(config_of(tmp_path, "run", tiny_model, pairs_file))
    before = {actor["ActorID"] for actor in ray._private.state.actors().values()}
    result = train(config)
    assert result.reference["scored_pairs"] == result.reference["started_replicas"] == 0
    after = [actor for actor in ray._private.state.actors().values() if actor["ActorID"] not in before]
    assert after
    assert not [actor for actor in after if "ReferenceReplica" in actor["ActorClassName"]]
    # Nobody scores a damaged file again here.
    damaged = next(Path(reference_of(config).uri).glob("*.parquet"))
    damaged.write_bytes(b"")
    with pytest.raises(Exception, match=r"damaged.*and reference.place is store_only"):
        train(config.model_copy(update={"name": "other"}))


def test_scores_that_users_bring(local_ray: None, tmp_path: Path, tiny_model: Path, pairs_file: str) -> None:
    """They are taken as they are, after a sample of each chunk agrees with the reference; else the row is named."""
    scored = plain_rows(tiny_model, pairs_file)
    brought = {"reference": {"columns": ["good", "bad"]}}
    calls = tmp_path / "rows.jsonl"
    # Another software's numerics: a hundredth of a nat per token.
    rows = [{**row, "good": a - 0.01 * n, "bad": b - 0.01 * m} for row, ((a, n), (b, m)) in scored]
    calls.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(tmp_path, "brought", tiny_model, str(calls), **brought)
    result = train(config)
    pairs = prepare(config)
    expected = {(float(np.float32(row["good"])), float(np.float32(row["bad"]))) for row in rows}
    found = {(scores[0], scores[1]) for scores in stored_scores(config, pairs).values()}
    assert found == expected
    assert len(found) == NUM_PAIRS
    # beta (h_w - h_l) is 0.1 * 0.01 * (n - m): ln 2 but for that.
    assert 1e-6 < abs(steps_of(Path(result.run_uri))[0]["loss"] - math.log(2)) < 0.02

    rows = [{**row, "good": a / n, "bad": b / m} for row, ((a, n), (b, m)) in scored]
    calls.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ReferenceFillError, match=r"rows.jsonl row \d+: reference.columns brings .*they look like means"
    ):
        train(config_of(tmp_path, "means", tiny_model, str(calls), **brought))

    rows = [{**row, "good": -1.0} for row, _ in scored]
    calls.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"no column 'bad', which reference.columns names; the rows have chosen, good,"):
        train(config_of(tmp_path, "missing", tiny_model, str(calls), **brought))

    rows[0]["bad"], rows[1]["bad"], rows[2]["bad"] = 1.5, None, float("nan")
    calls.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"rows cannot become a pair(.|\n)*row 1: bad is 1.5(.|\n)*row 2: bad is null"):
        train(config_of(tmp_path, "wrong", tiny_model, str(calls), **brought))

    rows = [{**row, "good": a, "bad": b} for row, ((a, _), (b, _)) in scored]
    calls.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cut = config_of(tmp_path, "cut", tiny_model, str(calls), **brought)
    cut = cut.model_copy(update={"data": cut.data.model_copy(update={"max_completion_length": 5})})
    with pytest.raises(DataError, match=r"good, bad: the pair is longer than data.max_length"):
        train(cut)


@pytest.mark.parametrize(("what", "times"), [("SIGKILL", 3), ("SIGSTOP", 1)])
def test_replicas_die_and_stand_still(
    local_ray: None,
    tmp_path: Path,
    tiny_model: Path,
    pairs_file: str,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    times: int,
) -> None:
    """In the middle of a chunk; every chunk is committed once, by the replica that takes its place."""
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for index in range(times):
        (tokens / str(index)).touch()
    options = {"replicas": 2}
    config = config_of(tmp_path, "run", tiny_model, pairs_file, reference=options, recovery={"hang_timeout_s": 8.0})
    prepare(config)
    listener = Listener()
    monkeypatch.setattr(replicas, "ASK_S", 1.0)
    with planted(tokens, monkeypatch, what):
        filled, _ = fill_reference(config, listener)
    assert (filled.scored_pairs, filled.lost_replicas) == (NUM_PAIRS, times)
    reason = "its process died" if what == "SIGKILL" else "gave no answer for"
    assert sum(reason in warning for warning in listener.warnings) == times
    pairs = prepare(config)
    assert_close(stored_scores(config, pairs), plain_scores(tiny_model, pairs))


def test_too_many_lost_replicas(
    local_ray: None, tmp_path: Path, tiny_model: Path, pairs_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for index in range(9):
        (tokens / str(index)).touch()
    config = config_of(tmp_path, "run", tiny_model, pairs_file, recovery={"max_reference_failures": 1})
    prepare(config)
    with planted(tokens, monkeypatch, "SIGKILL"), pytest.raises(Exception, match="max_reference_failures is 1"):
        fill_reference(config)


def test_status_and_gc(local_ray: None, tmp_path: Path, tiny_model: Path, pairs_file: str) -> None:
    kept, gone = (config_of(tmp_path, name, tiny_model, pairs_file) for name in ("kept", "gone"))
    gone = gone.model_copy(update={"data": gone.data.model_copy(update={"max_completion_length": 6})})
    files = {}
    for config in (kept, gone):
        files[config.name] = tmp_path / f"{config.name}.yaml"
        files[config.name].write_text(to_yaml(config))
    done = dpo_ray_command("reference", str(files["kept"]), "--status")
    assert done.returncode == 2
    assert "the pairs are not prepared" in done.stderr

    def said(*options: str) -> str:
        shown = CliRunner().invoke(app, ["reference", str(files["kept"]), *options])
        assert shown.exit_code == 0, shown.output
        return shown.output

    fill_reference(kept)
    filled, _ = fill_reference(gone)
    assert f"{NUM_PAIRS} of {NUM_PAIRS}" in said("--status")
    assert "nothing to remove" in said("--gc", "--yes")
    storage.remove(gone.run_uri)
    folder = Path(reference_of(kept).uri)
    before = len(list(folder.glob("*.parquet")))
    assert "removed" in said("--gc", "--yes")
    assert 0 < len(list(folder.glob("*.parquet"))) < before
    assert fill_reference(kept)[0].hit_pairs == NUM_PAIRS
    assert fill_reference(gone)[0].scored_pairs == filled.scored_pairs
    refused = CliRunner().invoke(app, ["reference", str(files["kept"]), "--yes"])
    assert isinstance(refused.exception, ConfigError)
    assert "give --status, or --gc" in str(refused.exception)


def _within_memory(
    rank: int,
    world_size: int,
    folder: str,
    tiny_model: str,
    pairs: list[TokenizedPair],
    expected: list[np.ndarray],
    model_bytes: int,
) -> None:
    # Code counts too: all of it is there when the limit is set.
    Scorer(tiny_model, "float32", "packed", 500, CPU, sharded=True).score(pairs)
    # What may come on top of what this process has: three quarters of a model.
    status = Path("/proc/self/status").read_text().splitlines()
    (used_kib,) = (int(line.split()[1]) for line in status if line.startswith("VmData"))
    limit = used_kib * 1024 + model_bytes * 3 // 4
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    scores = Scorer(folder, "float32", "packed", 500, CPU, sharded=True).score(pairs)
    for ours, theirs in zip(scores, expected, strict=True):
        assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-5)
    # A whole one does not fit.
    with pytest.raises((RuntimeError, MemoryError), match="(?i)memory"):
        torch.zeros(model_bytes // 4)


def test_a_model_larger_than_a_worker(local_ray: None, tmp_path: Path, tiny_model: Path, pairs_file: str) -> None:
    """Two ranks whose memory is limited to three quarters of the model hold it together."""
    tokenizer, folder = byte_tokenizer(), tmp_path / "large"
    config = tiny_llama_config(len(tokenizer), hidden_size=512, num_layers=40, num_heads=8)
    model = LlamaForCausalLM(config)
    # What is read of a file is mapped as a whole, and counts.
    model.save_pretrained(folder, max_shard_size="50MB")
    tokenizer.save_pretrained(folder)
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    made = prepare(config_of(tmp_path, "run", folder, pairs_file))
    pairs = read_chunk(made.uri, made.train[0])[:8]
    expected = Scorer(str(folder), "float32", "packed", 500, CPU).score(pairs)
    run_ranks(_within_memory, 2, tmp_path, str(folder), str(tiny_model), pairs, expected, model_bytes)


def test_training_meets_scores_as_they_come(
    local_ray: None, tmp_path: Path, tiny_model: Path, pairs_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time that training waited for scores is in its metrics; with a full store it is none."""
    score = replicas.ReferenceReplica.score

    def slow(self: replicas.ReferenceReplica, chunk: Any) -> int:
        time.sleep(1.0)
        return score(self, chunk)

    slow.__module__ = "__main__"
    changed = type("Slow", (replicas.ReferenceReplica,), {"score": slow, "__module__": "__main__"})
    with monkeypatch.context() as patch:
        patch.setattr(replicas, "ReferenceReplica", changed)
        behind = train(config_of(tmp_path, "behind", tiny_model, pairs_file))
    ahead = train(config_of(tmp_path, "ahead", tiny_model, pairs_file))
    waited = {
        name: sum(line["perf/reference_wait_s"] for line in steps_of(Path(result.run_uri)))
        for name, result in (("behind", behind), ("ahead", ahead))
    }
    # Ten chunks, a second each, one after the other.
    assert waited["behind"] > 1.0
    assert waited["ahead"] == 0.0
    assert behind.reference["waited_share"] > 0.05
    losses = [[line["loss"] for line in steps_of(Path(each.run_uri))] for each in (behind, ahead)]
    assert losses[0] == losses[1]
