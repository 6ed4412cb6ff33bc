"""prepare: the same bytes whatever the parallelism or the order of files; every row accounted for."""

import gzip
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import S3Server
from helpers import tiny_config
from rich.console import Console

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.demo_data import make_pairs
from dpo_ray.display import source_table
from dpo_ray.errors import ConfigError, DataError, RowError
from dpo_ray.orchestration import rows
from dpo_ray.orchestration.prepare import Survey, _make_runs, prepare, survey
from dpo_ray.orchestration.rows import Job, SourceFile, json_object
from dpo_ray.orchestration.watch import SourcePreview, Watcher
from dpo_ray.pairs.formats import Reading
from dpo_ray.pairs.statistics import describe
from dpo_ray.pairs.store import Chunk, read_chunk, score_gaps, sources_of
from dpo_ray.pairs.tokenize import Limits

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def test_prepare(tmp_path: Path, tiny_model: Path, local_ray: None, s3_server: S3Server) -> None:
    rows: list[dict[str, Any]] = make_pairs(300, seed=4)
    text = "".join(json.dumps(row) + "\n" for row in rows)

    one = tmp_path / "one"
    one.mkdir()
    (one / "all.jsonl").write_text(text)
    made = prepare(tiny_config(str(tmp_path / "a"), "run", tiny_model, str(one / "all.jsonl")))
    unique = len({json.dumps(row) for row in rows})
    assert made.counts["rows"] == 300
    assert made.counts["pairs"] + made.counts["eval_pairs"] == unique
    assert made.counts["duplicates"] == 300 - unique
    assert made.counts["rejects"] == made.counts["identical"] == 0

    # The same rows from several files, of other kinds, in another order, on object storage, with duplicates.
    s3 = s3_server.uri("raw/")
    storage.write_bytes(s3 + "/z.jsonl.gz", gzip.compress("".join(text.splitlines(True)[200:][::-1]).encode()))
    table = pa.Table.from_pylist(rows[100:210][::-1])
    pq.write_table(table, tmp_path / "y.parquet")
    storage.upload(str(tmp_path / "y.parquet"), s3 + "/y.parquet")
    storage.write_bytes(s3 + "/a.jsonl", "".join(text.splitlines(True)[:100]).encode())
    storage.write_bytes(s3 + "/empty.jsonl", b"")
    config = tiny_config(
        str(tmp_path / "b"), "run", tiny_model, "", data={"train": [s3 + "/*.jsonl*", s3 + "/*.parquet"]}
    )
    other = prepare(config)
    assert other.counts["rows"] == 310
    assert other.counts["duplicates"] == 310 - unique
    assert files(Path(made.uri)) == files(Path(other.uri))
    assert other.train == made.train
    assert other.eval == made.eval

    # Found again: nothing is written anew.
    times = {path: path.stat().st_mtime_ns for path in Path(other.uri).iterdir()}
    assert prepare(config) == other
    assert {path: path.stat().st_mtime_ns for path in Path(other.uri).iterdir()} == times


def test_rejects(tmp_path: Path, tiny_model: Path, local_ray: None) -> None:
    good = [json.dumps(row) for row in make_pairs(96, seed=5)]
    same = json.dumps({"prompt": "Say it.", "chosen": "Yes", "rejected": "Yes"})
    long = json.dumps({"prompt": "x" * 600, "chosen": "Yes", "rejected": "No"})
    lines = [
        *good[:10],
        "{broken",
        same,
        "",
        long,
        *good[10:],
        json.dumps({"prompt": "p", "chosen": " ", "rejected": "b"}),
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    sections = {"data": {"max_length": 512, "max_reject_fraction": 0.05}}
    made = prepare(tiny_config(str(tmp_path), "run", tiny_model, str(path), **sections))
    assert made.counts["rows"] == 100
    assert made.counts["rejects"] == 3
    assert made.counts["identical"] == 1
    (rejected,) = (tmp_path / "run" / "rejects").iterdir()
    copied = rejected.stat().st_mtime_ns
    rejects = storage.read_json_lines(str(rejected))
    assert [(reject["source"], reject["row"]) for reject in rejects] == [
        (str(path), 11),
        (str(path), 14),
        (str(path), 101),
    ]
    assert [reject["text"] for reject in rejects] == [lines[10], lines[13], lines[100]]
    assert "JSON" in rejects[0]["reason"]
    assert "max_length" in rejects[1]["reason"]
    assert "chosen" in rejects[2]["reason"]

    # They are copied once, and again where the pairs are other ones.
    prepare(tiny_config(str(tmp_path), "run", tiny_model, str(path), **sections))
    assert rejected.stat().st_mtime_ns == copied
    path.write_text("\n".join(lines) + "\n{another\n")
    prepare(tiny_config(str(tmp_path), "run", tiny_model, str(path), **sections))
    (rejected,) = (tmp_path / "run" / "rejects").iterdir()
    assert [reject["row"] for reject in storage.read_json_lines(str(rejected))] == [11, 14, 101, 102]
    path.write_text("\n".join(lines) + "\n")

    # More than the limit: one message, and no store.
    before = set((tmp_path / "store" / "pairs").iterdir())
    with pytest.raises(DataError, match=r"(?s)3 of 100 rows .* row 11: not valid JSON.* row 14: .* row 101: "):
        prepare(tiny_config(str(tmp_path), "strict", tiny_model, str(path), data={"max_length": 256}))
    (rejected,) = (tmp_path / "strict" / "rejects").iterdir()
    assert len(storage.read_json_lines(str(rejected))) == 3
    (refused,) = set((tmp_path / "store" / "pairs").iterdir()) - before
    assert [path.name for path in refused.iterdir()] == ["rejects"]


def test_what_a_killed_prepare_has_done_is_not_done_again(tmp_path: Path, tiny_model: Path, local_ray: None) -> None:
    """Without its manifest and its chunks, with its runs still there, a store is made from them, the same."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_pairs(300, seed=8)))
    config = tiny_config(str(tmp_path), "run", tiny_model, str(path))
    kept: dict[Path, bytes] = {}

    class Keeper(Watcher):
        def progress(self, what: str, done: int, total: int) -> None:
            for run in (tmp_path / "store" / "pairs").glob("*/runs/*"):
                kept[run] = run.read_bytes()

    made = prepare(config, Keeper())
    assert not list((tmp_path / "store" / "pairs").glob("*/runs/*"))
    expected = files(Path(made.uri))
    for place in Path(made.uri).glob("*.*"):
        place.unlink()
    assert {run.suffix for run in kept} == {".json", ".arrow"}
    for run, content in kept.items():
        run.parent.mkdir(exist_ok=True)
        run.write_bytes(content)
        os.utime(run, (1, 1))
    seen: list[float] = []

    class Reader(Watcher):
        def progress(self, what: str, done: int, total: int) -> None:
            seen.extend(run.stat().st_mtime for run in (tmp_path / "store" / "pairs").glob("*/runs/*"))

    assert prepare(config, Reader()) == made
    assert files(Path(made.uri)) == expected
    assert set(seen) == {1.0}


def test_scores_of_answers(tmp_path: Path, tiny_model: Path, local_ray: None) -> None:
    """Pairs by their scores, and what a ranking keeps, go with their gaps beside chunks that are the same without."""
    plain = [json.loads(line) for line in sorted({json.dumps(row) for row in make_pairs(150, seed=7)})]
    rows = [{**row, "good": 1 + number, "bad": number // 2} for number, row in enumerate(plain)]
    tied = {"prompt": "p", "chosen": "a", "rejected": "b", "good": 1.5, "bad": 1}
    wrong = {**tied, "good": "high"}
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, tied, wrong]))
    data = {"score_columns": ["good", "bad"], "min_score_gap": 0.5, "max_reject_fraction": 0.5}

    def config(file: str, **data: Any) -> Config:
        return tiny_config(str(tmp_path), "run", tiny_model, str(tmp_path / file), data=data)

    made = prepare(config("scored.jsonl", **data))
    without = prepare(config("plain.jsonl"))
    assert (made.counts["tied"], made.counts["rejects"], made.counts["with_scores"]) == (1, 1, len(rows))
    assert files(Path(made.uri)) == files(Path(without.uri))
    gap_of = {f"{tmp_path}/scored.jsonl row {n + 1}": 1 + n - n // 2 for n in range(len(rows))}
    for chunk in (*made.train, *made.eval):
        places = sources_of(made.uri, chunk)
        assert score_gaps(made.uri, chunk, list(places)).tolist() == [gap_of[place] for place in places.values()]
    found = describe(made).score_gaps
    assert found is not None
    assert (found.pairs, found.percentiles[-1]) == (len(rows), max(gap_of.values()))
    assert describe(without).score_gaps is None

    # The answers whose tokens are those of a better one go before the worst is looked for.
    ranking = {"prompt": "p", "answers": ["b", "a", "a", "c"], "scores": [2, 9, 1, 4]}
    (tmp_path / "ranking.jsonl").write_text("".join(json.dumps({**ranking, "prompt": p}) + "\n" for p in "pqrs"))
    ranked = prepare(config("ranking.jsonl"))
    gaps = [
        score_gaps(ranked.uri, chunk, list(sources_of(ranked.uri, chunk))).tolist()
        for chunk in (*ranked.train, *ranked.eval)
    ]
    assert sum(gaps, []) == [9 - 2] * 4


def test_scores_name_a_store_where_they_are_set(tmp_path: Path, tiny_model: Path) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "good": 2, "bad": 1}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    (tmp_path / "ranking.jsonl").write_text(json.dumps({"prompt": "p", "answers": ["a", "b"], "scores": [2, 1]}))

    def found(file: str = "pairs.jsonl", **data: Any) -> Survey:
        return survey(tiny_config(str(tmp_path / "s"), "run", tiny_model, str(tmp_path / file), data=data))

    scored = {"score_columns": ["good", "bad"]}
    assert '"score_columns"' not in json.dumps(found().about)
    assert len({found().uri, found(**scored).uri, found(**scored, min_score_gap=0.5).uri}) == 3
    # Where the tasks run does not.
    assert found(label_selector={"pool": "data"}).uri == found().uri
    with pytest.raises(DataError, match="no column 'worse', which data.score_columns names; the rows have bad, chosen"):
        found(score_columns=["good", "worse"])
    with pytest.raises(
        ConfigError, match=r"score_columns is \['good', 'bad'\], but .*ranking.jsonl has rows with a list"
    ):
        found("ranking.jsonl", **scored)
    with pytest.raises(
        ConfigError, match=r"min_score_gap is 0.5, but no source .* set data.score_columns to the columns"
    ):
        found(min_score_gap=0.5)


def test_held_out_pairs_are_not_trained_on(tmp_path: Path, tiny_model: Path, local_ray: None) -> None:
    rows = [json.dumps(row) for row in make_pairs(120, seed=6)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "held.jsonl").write_text("\n".join(rows[100:]))
    data = {"eval": [str(tmp_path / "held.jsonl")], "eval_fraction": 0.0}
    made = prepare(tiny_config(str(tmp_path), "run", tiny_model, str(tmp_path / "train.jsonl"), data=data))
    ids = [
        {pair.pair_id for chunk in chunks for pair in read_chunk(made.uri, chunk)} for chunks in (made.train, made.eval)
    ]
    assert not ids[0] & ids[1]
    assert len(ids[1]) == len(set(rows[100:]))
    assert len(ids[0]) + len(ids[1]) == len(set(rows))


def test_sources_and_held_out_sets_are_kept_apart(tmp_path: Path, tiny_model: Path, local_ray: None) -> None:
    """A pair of two sources stays in the one that comes first by name; one that is held out stays in no source."""
    rows = list(dict.fromkeys(json.dumps(row) for row in make_pairs(200, seed=6)))
    parts = {"b": rows[:60], "a": rows[50:100], "x": rows[100:110] + rows[:5], "y": rows[105:120]}
    for name, lines in parts.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    place = {name: str(tmp_path / f"{name}.jsonl") for name in parts}
    data = {"train": {place["b"]: 0.5, place["a"]: 2.0}, "eval": {"y": [place["y"]], "x": [place["x"]]}}
    data["eval_fraction"] = 0.0
    made = prepare(tiny_config(str(tmp_path), "run", tiny_model, "", data=data))
    assert {chunk.source for chunk in made.train} == {chunk.source for chunk in made.eval} == {0, 1}

    def num(chunks: Sequence[Chunk], source: int) -> int:
        return sum(chunk.num_pairs for chunk in chunks if chunk.source == source)

    assert [num(made.train, 0), num(made.train, 1)] == [50, 60 - 10 - 5]
    assert [num(made.eval, 0), num(made.eval, 1)] == [15, 15]
    assert made.counts["duplicates"] == 15
    # Other weights, and another order of names, are no other store.
    data["train"] = {place["a"]: 1.0, place["b"]: 1.0}
    assert prepare(tiny_config(str(tmp_path), "run", tiny_model, "", data=data)) == made
    (tmp_path / "c.jsonl").write_text("\n".join(rows[50:60]))
    data["train"] = {place["a"]: 1.0, str(tmp_path / "c.jsonl"): 1.0}
    with pytest.raises(DataError, match=r"c.jsonl: every pair is held out too, or in an entry of data.train before it"):
        prepare(tiny_config(str(tmp_path), "run", tiny_model, "", data=data))
    data["train"] = {place["a"]: 1.0, str(tmp_path / "[a].jsonl"): 1.0}
    with pytest.raises(DataError, match=r"a.jsonl is in two entries of data.train: keep it in one of them"):
        survey(tiny_config(str(tmp_path), "run", tiny_model, "", data=data))


def test_a_store_is_named_by_how_its_files_are_read(tmp_path: Path, tiny_model: Path) -> None:
    """b.jsonl repeats its prompts, a.jsonl does not: read as one source both are text, as two each is what it is."""
    plain = [{"prompt": f"question {n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(90)]
    repeated = [
        {"prompt": f"what is {n}", "chosen": f"what is {n} yes", "rejected": f"what is {n} no"} for n in range(9)
    ]
    for name, its_rows in (("a", plain), ("b", repeated)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in its_rows))

    def found(*patterns: str) -> Survey:
        data = {"train": [str(tmp_path / pattern) for pattern in patterns]}
        return survey(tiny_config(str(tmp_path / "s"), "run", tiny_model, "", data=data))

    together, apart = found("*.jsonl"), found("a.jsonl", "b.jsonl")
    assert together.job is not None
    assert apart.job is not None
    assert [file.reading.format for file in together.job.files] == ["text", "text"]
    assert [file.reading.format for file in apart.job.files] == ["text", "repeated"]
    assert together.uri != apart.uri
    with pytest.raises(DataError, match=r"b.jsonl is in two entries of data.train, read as text and as repeated"):
        found("*.jsonl", "b.jsonl")


def test_a_row_that_is_nested_too_deeply_is_a_reject() -> None:
    with pytest.raises(RowError, match="not valid JSON"):
        json_object(b'{"a": ' + b"[" * 100_000)


def test_names_of_files_are_not_markup() -> None:
    """Square brackets are markup to the library that draws the table."""
    preview = SourcePreview("data/[ab]*[/x].jsonl", 1, 10, Reading("text", {"prompt": "[/y]"}), (), None)
    console = Console(width=100, record=True)
    console.print(source_table(preview))
    shown = console.export_text()
    assert "data/[ab]*[/x].jsonl: 1 file, 10 bytes" in shown
    assert "prompt = '[/y]'" in shown


def test_reading_waits_for_tokenizing(tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw text does not pile up in memory where reading is faster than tokenizing."""
    num_files, file_bytes = 40, 2 * 2**20
    sources = []
    for number in range(num_files):
        path = tmp_path / f"{number:02d}.jsonl"
        path.write_text((json.dumps({"text": "x" * 1000}) + "\n") * (file_bytes // 1013))
        sources.append(SourceFile(str(path), path.stat().st_size, "", "train", Reading("standard", {})))
    job = Job("", tuple(sources), "", "", "none", Limits(512), 0, "{}", 0.0)
    log, read = tmp_path / "log", rows.read

    def logged_read(batch: dict[str, Any], job: Job) -> Iterator[pa.Table]:
        with log.open("a") as file:
            file.write("read\n")
        yield from read(batch, job)

    def slow(table: pa.Table, job: Job) -> pa.Table:
        time.sleep(0.2)
        with log.open("a") as file:
            file.write("made\n")
        return pa.table({"record": [json.dumps({"num_bytes": 1})]})

    monkeypatch.setattr(rows, "read", logged_read)
    monkeypatch.setattr(rows, "make_runs", slow)
    # Room for eight files.
    monkeypatch.setattr("dpo_ray.orchestration.prepare.LEAST_BLOCKS", 2)
    monkeypatch.setattr("dpo_ray.orchestration.prepare.READ_AHEAD", 0)
    config = tiny_config(str(tmp_path), "run", "model", "pairs.jsonl")
    assert len(list(_make_runs(config, job, Watcher()))) >= num_files
    events = log.read_text().split()
    ahead = max(events[:end].count("read") - events[:end].count("made") for end in range(len(events)))
    # Ray lets a task run in any case, and learns the size of a block from the first: a few more than the share.
    assert ahead <= 16
