"""The table of bad inputs: each ends with one message that names the place, the value and the way to mend it.

The command line is run as a user would run it. Storage and cluster have tables of their own, in
`test_storage_mistakes.py` and `test_doctor.py`.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import dpo_ray_command, tiny_config

from dpo_ray.config import to_yaml
from dpo_ray.demo_data import make_pairs

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

GOOD = make_pairs(20, seed=9)


def lines(rows: list[Any]) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def refused(folder: Path, model: Path, pairs: str, command: str = "prepare", *overrides: str) -> str:
    """Runs a command that must refuse; returns its message on one line."""
    (folder / "run.yaml").write_text(to_yaml(tiny_config(str(folder / "s"), "run", model, str(folder / pairs))))
    done = dpo_ray_command(command, str(folder / "run.yaml"), *(part for o in overrides for part in ("--set", o)))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.count("error: ") == 1
    # Nothing half-written: no store, and no file that is neither a reject nor a configuration.
    others = ("config.yaml", "rejects.json")
    left = [path for path in (folder / "s").rglob("*") if path.is_file()]
    assert not [path for path in left if "rejects" not in path.parts and path.name not in others], left
    return " ".join(done.stderr.split())


# mistake -> (number of the row, the row, what is said of it)
ROWS: dict[str, tuple[int, Any, str]] = {
    "broken JSON": (7, b'{"prompt": "a", ', "not valid JSON"),
    "not an object": (3, ["a"], "not a JSON object but a list"),
    "missing column": (5, {"prompt": "a", "chosen": "b"}, "no column 'rejected'"),
    "wrong type": (4, {"prompt": "a", "chosen": 3, "rejected": "b"}, "column 'chosen'"),
    "empty completion": (9, {"prompt": "a", "chosen": "", "rejected": "b"}, ".*'chosen' is empty"),
    "prompt too long": (
        2,
        {"prompt": "a" * 2000, "chosen": "b", "rejected": "c"},
        r"the prompt has 20\d\d tokens.*data.max_length.*data.max_prompt_length",
    ),
    "not UTF-8": (6, b'{"prompt": "\xff", "chosen": "b", "rejected": "c"}', "not UTF-8: byte 0xff"),
}


@pytest.mark.parametrize("mistakes", [list(ROWS)[:4], list(ROWS)[4:]], ids=["4", "3"])
def test_rows(tmp_path: Path, tiny_model: Path, shared_cluster: None, mistakes: list[str]) -> None:
    """A file with several mistakes: the message lists each with its row."""
    rows: list[Any] = [json.dumps(row).encode() for row in GOOD]
    for mistake in mistakes:
        number, row, _ = ROWS[mistake]
        rows[number - 1] = row
    (tmp_path / "pairs.jsonl").write_bytes(lines(rows))
    said = refused(tmp_path, tiny_model, "pairs.jsonl")
    expected = f"{len(mistakes)} of 20 rows cannot become a pair, more than data.max_reject_fraction (0.01) allows"
    assert expected in said
    for mistake in mistakes:
        number, _, message = ROWS[mistake]
        assert re.search(rf"pairs.jsonl row {number}: {message}", said), said


FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("pairs.jsonl", b"", "pairs.jsonl: there is no row in it"),
    "truncated gzip": ("pairs.jsonl.gz", gzip.compress(lines(GOOD))[:-100], "pairs.jsonl.gz: cannot read past row"),
    "not gzip": ("pairs.jsonl.gz", lines(GOOD), "pairs.jsonl.gz: cannot read past row 0: Not a gzipped file"),
    "Parquet without its footer": ("pairs.parquet", b"PAR1" + b"x" * 500, "pairs.parquet: cannot read past row 0"),
    "no column": (
        "pairs.jsonl",
        lines([{"prompt": row["prompt"], "chosen": row["chosen"], "rejcted": row["rejected"]} for row in GOOD]),
        "pairs.jsonl: .*no column 'rejected'.*rejcted",
    ),
    "all broken": ("pairs.jsonl", b"{oops\n", "pairs.jsonl row 1: not valid JSON"),
    "unknown kind": ("pairs.csv", b"a,b\n", "pairs.csv: unknown kind of file; known are .jsonl"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", FILES)
def test_files(tmp_path: Path, tiny_model: Path, mistake: str) -> None:
    name, content, message = FILES[mistake]
    (tmp_path / name).write_bytes(content)
    said = refused(tmp_path, tiny_model, name)
    assert re.search(message, said), said


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def small_embedding(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


MODELS: list[tuple[Callable[[Path], None], str]] = [
    (without_tokenizer, "model: cannot load a tokenizer.*model.tokenizer"),
    (without_template, "has no (default )?.*chat template.*data.chat_template: none"),
    (small_embedding, r"the tokenizer has \d+ tokens, the model's embedding 100 rows"),
    (without_config, "model: no config.json there"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("harm", "message"), MODELS)
def test_models(tmp_path: Path, tiny_model: Path, harm: Callable[[Path], None], message: str) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    harm(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_bytes(lines(GOOD))
    said = refused(tmp_path, tmp_path / "model", "pairs.jsonl")
    assert re.search(message, said), said


KEYS: dict[str, str] = {
    "objective.bta=0.2": "unknown key objective.bta: did you mean objective.beta?",
    "data.train=[nothing.jsonl]": "nothing.jsonl: no such file",
    "data.format=parquet": "data.format is 'parquet'.*auto",
    "train.global_batch_pairs=1": r"train.global_batch_pairs is 1, fewer than scaling.workers \(2\)",
    "optimizer.learning_rate=fast": "optimizer.learning_rate is 'fast'",
    "tracking.trackers=[comet]": "tracking.trackers.*'comet'",
}


@pytest.mark.slow
@pytest.mark.parametrize("override", KEYS)
def test_keys(tmp_path: Path, tiny_model: Path, override: str) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(lines(GOOD))
    said = refused(tmp_path, tiny_model, "pairs.jsonl", "train", "scaling.workers=2", override)
    assert re.search(KEYS[override], said), said


def test_a_loss_that_is_not_finite_names_its_pairs(tmp_path: Path, tiny_model: Path) -> None:
    """A learning rate of 1e30: the second step's gradient is not finite. Of its batch of 12 eight are named by row."""
    (tmp_path / "pairs.jsonl").write_bytes(lines(make_pairs(60, seed=3)))
    config = tiny_config(str(tmp_path / "s"), "run", tiny_model, str(tmp_path / "pairs.jsonl"))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    arguments = ("--set", "optimizer.learning_rate=1e30", "--set", "optimizer.warmup_steps=0")
    done = dpo_ray_command("train", str(tmp_path / "run.yaml"), *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    said = " ".join(done.stderr.split())
    assert re.search(r"step 2: loss \S+, gradient norm nan; nothing of this step was kept", said), said
    assert "Lower optimizer.learning_rate (now " in said
    assert said.count(f"{tmp_path}/pairs.jsonl row ") == 8
    assert said.split("All pairs of this batch: ")[1].count(",") == 11


def test_a_newcomers_file_is_mended_by_the_messages_alone(tmp_path: Path, tiny_model: Path) -> None:
    """Twenty rows, three mistakes of different kinds: each message says which row, and what to do."""
    rows: list[Any] = [*GOOD]
    rows[3] = b'{"prompt": "Say hello", "chosen": "Hello", "rejected": "No"'
    rows[10] = {"prompt": "Say bye", "chosen": "Bye"}
    rows[15] = {"prompt": "Say yes", "chosen": "   ", "rejected": "No"}
    path = tmp_path / "mine.jsonl"
    path.write_bytes(lines(rows))
    said = refused(tmp_path, tiny_model, "mine.jsonl")
    assert "3 of 20 rows" in said
    for number in (4, 11, 16):
        assert f"mine.jsonl row {number}: " in said
    rows[3] = json.loads(rows[3] + b"}")
    path.write_bytes(lines(rows))
    said = refused(tmp_path, tiny_model, "mine.jsonl")
    assert "2 of 20 rows" in said
    assert "row 4" not in said
    rows[10]["rejected"] = "Hi"
    del rows[15]
    path.write_bytes(lines(rows))
    done = dpo_ray_command("prepare", str(tmp_path / "run.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "format text" in done.stdout
    assert "Say hello" in done.stdout or "Say bye" in done.stdout or GOOD[0]["prompt"] in done.stdout
