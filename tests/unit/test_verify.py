"""The verdict on a run: exact runs are exact, however they came about, and whatever is wrong is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import chunk_table, dpo_ray_command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dpo_ray import storage
from dpo_ray.errors import DataError
from dpo_ray.orchestration.verify import Verdict, verify
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.pairs import store
from dpo_ray.pairs.plan import Plan
from dpo_ray.pairs.tokenize import pair_id
from dpo_ray.training import manifest
from dpo_ray.types import TokenizedPair, TrainState

# 82 pairs in batches of 8: 11 steps an epoch, the last of 82 - 10 * 8 = 2 pairs; 22 steps in two epochs.
SIZES, BATCH, EPOCHS, SEED, PER_EPOCH, TOTAL = (30, 25, 27), 8, 2, 7, 11, 22
Lines = list[dict[str, Any]]
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass
class Run:
    """A run as it would be on storage."""

    pairs_uri: str
    batches: list[list[bytes]]
    ledger: Lines = field(default_factory=list)
    metrics: Lines = field(default_factory=list)
    attempts: Lines = field(default_factory=list)
    checkpoints: dict[int, int] = field(default_factory=dict)
    exported: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    full: bool = True
    data: list[str] | dict[str, float] = field(default_factory=lambda: ["pairs.jsonl"])
    per_epoch: int = PER_EPOCH

    def entry(self, step: int, attempt: int) -> dict[str, Any]:
        """The line that an attempt writes for a step."""
        ids = self.batches[step - 1]
        digest = hashlib.sha256(b"".join(ids)).hexdigest()[:32]
        about = {"attempt": attempt, "world_size": self.attempts[attempt]["world_size"]}
        listed = {"pair_ids": [each.hex() for each in ids]} if self.full else {}
        return {"step": step, "digest": digest, "num_pairs": len(ids), **about, **listed}

    def begin(self, position: int, world_size: int) -> int:
        """Puts an attempt on record."""
        number = len(self.attempts)
        self.attempts.append(
            {"attempt": number, "position": position, "world_size": world_size, "reason": "test", "more": number}
        )
        return number

    def open(self, attempt: int) -> None:
        """An attempt drops what stands after its position."""
        position = self.attempts[attempt]["position"]
        del self.metrics[position:], self.ledger[position:]

    def steps(self, attempt: int, stop: int) -> None:
        """An attempt's steps, from its position to `stop`."""
        self.open(attempt)
        for step in range(self.attempts[attempt]["position"] + 1, stop + 1):
            self.ledger.append(self.entry(step, attempt))
            self.metrics.append({"step": step, "loss": 0.5})

    def write(self, uri: str) -> str:
        """Puts the run on storage."""
        train = {"epochs": EPOCHS, "global_batch_pairs": BATCH, "max_steps": None, "ledger": "full", **self.config}
        described = {
            "config": {"seed": SEED, "train": train, "data": {"train": self.data}, "of": "another version"},
            "about": {"pairs": self.pairs_uri, "steps_per_epoch": self.per_epoch},
        }
        storage.remove(uri)
        storage.write_bytes(storage.join(uri, "config.yaml"), yaml.safe_dump(described).encode())
        evaluations = [{"step": step, "eval_loss": 0.5} for step in (5, 10)]
        for name, lines in {
            "ledger": self.ledger,
            "metrics": self.metrics + evaluations,
            "attempts": self.attempts,
        }.items():
            storage.write_json_lines(storage.join(uri, f"{name}.jsonl"), lines)
        for step, attempt in self.checkpoints.items():
            made = manifest.Manifest(TrainState(step), attempt, 1, {})
            manifest.commit(uri, made, lambda: None)
        if self.exported is not None:
            storage.write_json(storage.join(uri, "export", "exported.json"), {"step": self.exported})
        return uri


def make_store(uri: str) -> tuple[str, list[list[bytes]]]:
    """A pair store, and the global batches of two epochs."""
    rng, chunks = np.random.default_rng(0), []
    for index, size in enumerate(SIZES):
        pairs = []
        for _ in range(size):
            prompt, *answers = (rng.integers(0, 99, rng.integers(3, 9), dtype=np.int32) for _ in range(3))
            pairs.append(TokenizedPair(pair_id(prompt, tuple(answers)), prompt, tuple(answers)))
        chunks.append(store.write_chunk(uri, store.chunk_name("train", index), chunk_table(pairs)))
    return commit(uri, chunks)


def commit(uri: str, chunks: Sequence[store.Chunk]) -> tuple[str, list[list[bytes]]]:
    """Writes a store's manifest; the batches are put together here as the design has it, without the plan's code."""
    store.write_manifest(store.PairStore(uri, tuple(chunks), (), {"rows": sum(SIZES)}), {})
    ids = {chunk.key: [pair.pair_id for pair in store.read_chunk(uri, chunk)] for chunk in chunks}
    batches = []
    for epoch in range(EPOCHS):

        def keyed(content: bytes, key: bytes = f"{SEED}:{epoch}".encode()) -> bytes:
            return hashlib.blake2b(content, digest_size=16, key=key).digest()

        in_order = sorted(ids, key=lambda key: keyed(key.encode()))
        order = [pair for key in in_order for pair in sorted(ids[key], key=keyed)]
        batches += [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return uri, batches


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[bytes]]]:
    return make_store(str(tmp_path_factory.mktemp("verify") / "store" / "pairs" / "abc"))


def finished(made: tuple[str, list[list[bytes]]], full: bool = True) -> Run:
    """Two epochs in five attempts: one without a step, a restart from the checkpoint, one rolled back further."""
    run = Run(*made, full=full)
    run.steps(run.begin(0, 2), 7)
    run.begin(5, 3)
    run.steps(run.begin(5, 1), 17)
    run.steps(run.begin(15, 2), 19)
    run.steps(run.begin(10, 4), TOTAL)
    run.checkpoints = {20: 4, 22: 4}
    run.exported = TOTAL
    return run


def texts(verdict: Verdict) -> str:
    return "\n".join(f"{finding.step}: {finding.text}" for finding in verdict.findings)


@pytest.mark.parametrize("full", [True, False])
def test_an_exact_run(tmp_path: Path, made: tuple[str, list[list[bytes]]], full: bool) -> None:
    uri = finished(made, full).write(str(tmp_path / "run"))
    before = sorted(tmp_path.rglob("*"))
    verdict = verify(uri)
    assert verdict.findings == ()
    assert verdict.line == "exact: 22 of 22 steps, every pair once per epoch"
    assert (verdict.pairs, verdict.pairs_trained, verdict.steps_per_epoch) == (82, 164, 11)
    # Steps 1-5 stayed of attempt 0, 6-10 of attempt 2, the rest of attempt 4; 11-15 were surely done twice.
    assert [each.steps for each in verdict.attempts] == [5, 0, 5, 0, 12]
    assert verdict.redone_steps == 5
    assert sorted(tmp_path.rglob("*")) == before


def mixture(folder: str) -> Run:
    """A source of 30 pairs twice an epoch, and round(25 / 2) = 12 pairs of another: 72 pairs, 9 steps."""
    rng, chunks = np.random.default_rng(1), []
    for source, size in enumerate((30, 25)):
        pairs = []
        for _ in range(size):
            prompt, *answers = (rng.integers(0, 99, 6, dtype=np.int32) for _ in range(3))
            pairs.append(TokenizedPair(pair_id(prompt, tuple(answers)), prompt, tuple(answers)))
        chunks.append(store.write_chunk(folder, store.chunk_name(f"train.{source}", 0), chunk_table(pairs)))
    uri, _ = commit(folder, chunks)
    plan = Plan(SEED, tuple(chunks), BATCH, 18, (2.0, 0.5))
    ids = {chunk.name: [pair.pair_id for pair in store.read_chunk(uri, chunk)] for chunk in chunks}
    order = [
        ids[take.chunk.name][index]
        for epoch in range(EPOCHS)
        for take in plan.takes(epoch)
        for index in plan.pair_order(take, epoch, ids[take.chunk.name])
    ]
    run = Run(uri, [order[start : start + BATCH] for start in range(0, len(order), BATCH)])
    run.data, run.per_epoch = {"a.jsonl": 2.0, "b.jsonl": 0.5}, 9
    run.steps(run.begin(0, 2), 18)
    run.checkpoints, run.exported = {18: 0}, 18
    return run


def test_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = mixture(str(tmp_path / "store" / "pairs" / "abc"))
    verdict = verify(run.write(str(tmp_path / "run")))
    assert verdict.findings == ()
    assert verdict.line == "exact: 18 of 18 steps, every pair as often as its source's weight says"
    assert (verdict.pairs, verdict.pairs_trained) == (72, 144)
    run.data = {"a.jsonl": 2.0, "b.jsonl": 0.6}
    assert "steps per epoch" in texts(verify(run.write(str(tmp_path / "run"))))
    # A plan that takes the same half in both epochs is found by counting.
    run.data = {"a.jsonl": 2.0, "b.jsonl": 0.5}
    monkeypatch.setattr(Plan, "takes", lambda plan, epoch, takes=Plan.takes: takes(plan, 0))
    assert "train.1-000000.parquet 2 times, not 0 or 1" in texts(verify(run.write(str(tmp_path / "run"))))


def test_no_ids_are_kept_in_memory_when_there_is_no_room(
    tmp_path: Path, made: tuple[str, list[list[bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_ray.orchestration.verify.IDS_KEPT_BYTES", 0)
    monkeypatch.setattr("dpo_ray.orchestration.verify.PROGRESS_EVERY_S", -1.0)
    seen: list[tuple[int, int]] = []

    class Noting(Watcher):
        def progress(self, what: str, done: int, total: int) -> None:
            seen.append((done, total))

    assert verify(finished(made).write(str(tmp_path / "run")), Noting()).exact
    assert seen == [(step, 22) for step in range(1, 23)] + [(22, 22)]


def change(step: int, /, **values: Any) -> Callable[[Run], None]:
    """Changes a line of the ledger."""
    return lambda run: run.ledger[step - 1].update(values)


def swap(run: Run) -> None:
    run.ledger[6], run.ledger[7] = run.ledger[7], run.ledger[6]


def swap_ids(run: Run) -> None:
    ids = run.ledger[8]["pair_ids"]
    ids[2], ids[3] = ids[3], ids[2]


def one_pair_in_two_steps(run: Run) -> None:
    run.ledger[1]["pair_ids"][0] = run.ledger[0]["pair_ids"][0]


MUTATIONS: dict[str, tuple[Callable[[Run], None], str]] = {
    "gap": (lambda run: run.ledger.pop(8), "9: step 9 is missing: after step 8 comes step 10"),
    "wide gap": (lambda run: run.ledger.__delitem__(slice(3, 6)), "4: steps 4 to 6 are missing"),
    "duplicate": (lambda run: run.ledger.insert(4, run.ledger[3]), "4: a duplicate or out of order"),
    "swapped lines": (swap, "7: a duplicate or out of order: it stands after step 8"),
    "digest": (change(3, digest="0" * 32), "3: digest is 00000000000000000000000000000000, expected "),
    "num_pairs": (change(11, num_pairs=8), "11: num_pairs is 8, expected 2"),
    "order of ids": (swap_ids, "9: pair 3 of the step is "),
    "one id short": (lambda run: run.ledger[8]["pair_ids"].pop(), "9: pair_ids has 7 ids, expected 8"),
    "counted twice": (one_pair_in_two_steps, "is in the ledger 2 times"),
    "left out": (one_pair_in_two_steps, "parquet is not in the ledger"),
    "fenced attempt": (
        change(8, attempt=0, world_size=2),
        "8: is of attempt 0, expected attempt 2, which began after step 5",
    ),
    "attempt of dropped lines": (change(16, attempt=3, world_size=2), "16: is of attempt 3, expected attempt 4"),
    "unknown attempt": (change(8, attempt=9), "8: is of attempt 9, which is not in attempts.jsonl"),
    "world size": (change(8, world_size=2), "8: is of attempt 2: world_size is 2, in attempts.jsonl it is 1"),
    "no line": (change(8, step="8"), "None: ledger.jsonl, line 8: not a step's"),
    "short ledger": (lambda run: run.ledger.pop(), "22: has a checkpoint, but the ledger ends at step 21"),
    "no ledger": (lambda run: run.ledger.clear(), "22: has a checkpoint, but the ledger ends at step 0"),
    "too long": (lambda run: run.ledger.append({**run.ledger[21], "step": 23}), "23: beyond the end of the run"),
    "metrics": (lambda run: run.metrics.pop(6), "7: has no line in metrics.jsonl: after step 6 comes step 8"),
    "last of metrics": (lambda run: run.metrics.pop(), "22: the ledger ends at step 22, metrics.jsonl at step 21"),
    "metrics twice": (lambda run: run.metrics.insert(6, run.metrics[6]), "7: is in metrics.jsonl twice"),
    "attempts": (lambda run: run.attempts.insert(1, run.attempts[2]), "attempts.jsonl: attempt 1 stands after 2"),
    "no attempts": (
        lambda run: run.attempts.clear(),
        "1: steps 1 to 5 are of attempt 0, which is not in attempts.jsonl",
    ),
    "position": (
        lambda run: run.attempts[4].update(position=12),
        "11: steps 11 to 12 are of attempt 4, expected attempt 2",
    ),
    "late attempt": (lambda run: run.begin(10, 1), "11: steps 11 to 22 are of attempt 4, expected attempt 5"),
    "checkpoint": (lambda run: run.checkpoints.update({20: 3}), "20: its checkpoint is of attempt 3"),
    "steps per epoch": (
        lambda run: run.config.update(global_batch_pairs=9),
        "make 10 steps per epoch, config.yaml say",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_wrong_is_named(tmp_path: Path, made: tuple[str, list[list[bytes]]], name: str) -> None:
    run = finished(made)
    mutate, expected = MUTATIONS[name]
    mutate(run)
    verdict = verify(run.write(str(tmp_path / "run")))
    assert expected in texts(verdict)
    assert not verdict.exact
    assert verdict.line.startswith(f"not exact: {verdict.num_findings} finding")


def test_the_whole_ledger_of_a_fenced_attempt(tmp_path: Path, made: tuple[str, list[list[bytes]]]) -> None:
    """Attempt 0 went on after attempt 1 had begun and put its own ledger over the other's."""
    run = Run(*made)
    run.steps(run.begin(0, 2), 5)
    run.steps(run.begin(5, 2), 14)
    run.checkpoints = {5: 0, 10: 1}
    assert verify(run.write(str(tmp_path / "run"))).exact
    run.steps(0, 14)
    assert "6: steps 6 to 14 are of attempt 0, expected attempt 1" in texts(verify(run.write(str(tmp_path / "run"))))


def test_interrupted_runs_say_how_far_they_are(tmp_path: Path, made: tuple[str, list[list[bytes]]]) -> None:
    run = Run(*made)
    assert verify(run.write(str(tmp_path / "run"))).line == "exact so far: 0 of 22 steps, nothing trained yet"
    run.steps(run.begin(0, 2), 13)
    run.checkpoints = {5: 0, 10: 0}
    line = "exact so far: 13 of 22 steps, every pair once per epoch, 2 of 11 steps of epoch 2, no pair twice"
    assert verify(run.write(str(tmp_path / "run"))).line == f"{line}; the run is not finished"
    run.begin(10, 1)  # It has begun, and not yet dropped what it will do again.
    assert verify(run.write(str(tmp_path / "run"))).line == f"{line}; the run is not finished"
    del run.metrics[10:]
    assert verify(run.write(str(tmp_path / "run"))).exact
    del run.metrics[9:]
    assert "10: the ledger ends at step 13, metrics.jsonl at step 9" in texts(verify(run.write(str(tmp_path / "run"))))


def test_max_steps_within_an_epoch(tmp_path: Path, made: tuple[str, list[list[bytes]]]) -> None:
    run = Run(*made, config={"max_steps": 13}, exported=13, checkpoints={13: 0})
    run.steps(run.begin(0, 2), 13)
    line = "exact: 13 of 13 steps, every pair once per epoch, 2 of 11 steps of epoch 2, no pair twice"
    assert verify(run.write(str(tmp_path / "run"))).line == line
    # Ended earlier than it had come: it stays where it is.
    run.config["max_steps"] = 8
    assert "beyond the end of the run at step 8" in texts(verify(run.write(str(tmp_path / "run"))))
    run.begin(13, 2)
    assert verify(run.write(str(tmp_path / "run"))).line == line
    run.checkpoints = {}
    assert verify(run.write(str(tmp_path / "run"))).finished


@quick
@given(
    index=st.integers(0, TOTAL - 1),
    how=st.sampled_from(["drop", "double", "digest", "num_pairs", "step", "attempt", "world_size", "pair_ids"]),
    by=st.integers(1, 31),
    full=st.booleans(),
)
def test_any_changed_line_is_found(
    tmp_path: Path, made: tuple[str, list[list[bytes]]], index: int, how: str, by: int, full: bool
) -> None:
    run = finished(made, full=full or how == "pair_ids")
    line = run.ledger[index]
    if how == "drop":
        run.ledger.pop(index)
    elif how == "double":
        run.ledger.insert(by % (len(run.ledger) + 1), dict(line))
    elif how == "digest":
        place = by % 32
        line["digest"] = (
            line["digest"][:place] + f"{int(line['digest'][place], 16) ^ 1:x}" + line["digest"][place + 1 :]
        )
    elif how == "pair_ids":
        ids = line["pair_ids"]
        ids[by % len(ids)] = hashlib.sha256(ids[0].encode()).hexdigest()[:32]
    else:
        line[how] += by
    verdict = verify(run.write(str(tmp_path / "run")))
    assert not verdict.exact
    assert verdict.num_findings >= len(verdict.findings) > 0


@settings(parent=quick, max_examples=150)
@given(data=st.data())
def test_no_history_of_failures_raises_an_alarm(
    tmp_path: Path, made: tuple[str, list[list[bytes]]], data: st.DataObject
) -> None:
    """Attempts that die anywhere, write-outs cut in half, checkpoints set aside: the ledger is exact at any moment."""
    run, kept = Run(*made, full=False), 2
    for _ in range(data.draw(st.integers(1, 6), "attempts")):
        if run.checkpoints and data.draw(st.booleans(), "newest set aside"):
            del run.checkpoints[max(run.checkpoints)]
        position = max(run.checkpoints, default=0)
        attempt = run.begin(position, data.draw(st.integers(1, 4), "world size"))
        dies = data.draw(st.sampled_from(["before", "dropping", "later"]), "dies")
        if dies == "before":
            continue
        del run.metrics[position:]
        if dies == "dropping":
            continue
        del run.ledger[position:]
        stop = data.draw(st.integers(position, TOTAL), "steps")
        for step in range(position + 1, stop + 1):
            run.ledger.append(run.entry(step, attempt))
            run.metrics.append({"step": step, "loss": 0.5})
            if step % 5 == 0 or step == TOTAL:
                run.checkpoints[step] = attempt
                for old in sorted(run.checkpoints)[:-kept]:
                    del run.checkpoints[old]
        if stop < TOTAL:
            # What was done after the last checkpoint may not have been written out, or of one file only.
            safe = max(position, max(run.checkpoints, default=0))
            for lines in (run.ledger, run.metrics):
                del lines[data.draw(st.integers(safe, stop), "written out") :]
        else:
            run.exported = TOTAL if data.draw(st.booleans(), "exported") else None
            if run.exported:
                break
    verdict = verify(run.write(str(tmp_path / "run")))
    assert verdict.findings == ()
    assert sum(each.steps for each in verdict.attempts) == verdict.steps == len(run.ledger)


def other_chunk(folder: Path, ids: Sequence[bytes]) -> store.Chunk:
    """The second chunk with other pairs, the manifest left alone."""
    tokens = np.arange(3, dtype=np.int32)
    pairs = [TokenizedPair(each, tokens, (tokens, tokens)) for each in ids]
    return store.write_chunk(str(folder), store.chunk_name("train", 1), chunk_table(pairs))


@pytest.mark.parametrize("harm", ["missing pair", "other pair", "gone", "cut", "flipped", "manifest", "store"])
def test_a_damaged_store_is_named(tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "store"
    run = finished(make_store(str(folder)))
    uri = run.write(str(tmp_path / "run"))
    chunk = store.open_store(str(folder)).train[1]  # type: ignore[union-attr]
    ids, path = store.read_pair_ids(str(folder), chunk), folder / chunk.name
    data = bytearray(path.read_bytes())
    data[data.index(ids[0])] ^= 1
    {
        "missing pair": lambda: other_chunk(folder, ids[1:]),
        "other pair": lambda: other_chunk(folder, [bytes(16), *ids[1:]]),
        "gone": path.unlink,
        "cut": lambda: path.write_bytes(path.read_bytes()[:-100]),
        "flipped": lambda: path.write_bytes(data),
        "manifest": lambda: (folder / "manifest.json").write_text("{"),
        "store": (folder / "manifest.json").unlink,
    }[harm]()
    name = {"manifest": "manifest.json: damaged", "store": "pair store is gone"}.get(
        harm, f"{chunk.name}: the chunk is"
    )
    with pytest.raises(DataError, match=name):
        verify(uri)


def test_a_pair_in_two_chunks_is_found(tmp_path: Path) -> None:
    """The manifest has it so, and the ledger follows the plan: only counting finds it."""
    folder = tmp_path / "store"
    uri, _ = make_store(str(folder))
    made = store.open_store(uri)
    assert made is not None
    first, second, third = made.train
    twice = store.read_pair_ids(uri, first)[3]
    chunk = other_chunk(folder, [twice, *store.read_pair_ids(uri, second)[1:]])
    run = finished(commit(uri, (first, chunk, third)), full=False)
    verdict = verify(run.write(str(tmp_path / "run")))
    assert texts(verdict) == f"None: pair {twice.hex()} is in the pair store more than once"


def test_runs_and_stores_moved_together(tmp_path: Path) -> None:
    run = finished(make_store(str(tmp_path / "old" / "store" / "pairs" / "abc")))
    run.write(str(tmp_path / "old" / "run"))
    (tmp_path / "old").rename(tmp_path / "new")
    assert verify(str(tmp_path / "new" / "run")).exact
    with pytest.raises(DataError, match="not the directory of a run"):
        verify(str(tmp_path / "new"))


def test_the_command(tmp_path: Path, made: tuple[str, list[list[bytes]]]) -> None:
    from dpo_ray.cli import app

    uri = finished(made).write(str(tmp_path / "run"))
    shown = CliRunner().invoke(app, ["verify", uri])
    assert shown.exit_code == 0, shown.output
    assert "exact: 22 of 22 steps, every pair once per epoch" in shown.output
    assert "at least 5 steps were done again" in shown.output
    run = finished(made)
    for line in run.ledger:
        line["digest"] = "0"
    shown = CliRunner().invoke(app, ["verify", run.write(uri)])
    assert shown.exit_code == 1
    assert "step 1: digest is 0, expected" in shown.output
    assert "and 2 more" in shown.output
    shown = CliRunner().invoke(app, ["verify", "--json", uri])
    assert shown.exit_code == 1
    verdict = json.loads(shown.stdout)
    assert (verdict["exact"], verdict["steps"], verdict["num_findings"]) == (False, 22, 22)
    assert verdict["findings"][0]["step"] == 1


def test_no_run_there(tmp_path: Path) -> None:
    done = dpo_ray_command("verify", "--json", str(tmp_path / "none"))
    assert done.returncode == 2, done.stderr
    assert "it has no config.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_neither_ray_nor_torch_is_imported() -> None:
    import subprocess
    import sys

    code = "import dpo_ray.orchestration.verify, sys; sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.integration
def test_on_object_storage(s3_server: Any) -> None:
    run = finished(make_store(s3_server.uri("verify/store/pairs/abc")))
    uri = run.write(s3_server.uri("verify/run"))
    assert verify(uri).line == "exact: 22 of 22 steps, every pair once per epoch"
    run.ledger.pop(3)
    assert "4: step 4 is missing" in texts(verify(run.write(uri)))
    with pytest.raises(DataError, match="not the directory of a run"):
        verify(s3_server.uri("verify/none"))
