"""`dpo-ray data` as a user has it, on a small store that is there already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers import chunk_table, tiny_config, tokenized
from typer.testing import CliRunner

from dpo_ray.cli import app
from dpo_ray.config import to_yaml
from dpo_ray.model.files import load_tokenizer
from dpo_ray.orchestration.prepare import survey
from dpo_ray.pairs import store

LONG = "The quick brown fox jumps over the lazy dog, again and again, until the evening comes and it may sleep. "


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> str:
    """Thirty pairs to train on, of which two are nearly the same, and two held-out ones, of which one is leaked."""
    folder = tmp_path_factory.mktemp("data-command")
    rows = [
        {"prompt": f"{number} " * 20, "chosen": f"{number * 7}? " * 20, "rejected": f"no {number}"}
        for number in range(28)
    ]
    fox = [{"prompt": LONG, "chosen": LONG + end, "rejected": "no"} for end in ("Yes.", "Yes!")]
    held_out = [
        {"prompt": LONG, "chosen": LONG + "Yes?", "rejected": "no"},
        {**rows[0], "prompt": "Else", "chosen": "x"},
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps({**row, "good": 1, "bad": 0}) + "\n" for row in rows))
    config = tiny_config(
        str(folder),
        "run",
        tiny_model,
        str(folder / "pairs.jsonl"),
        data={"score_columns": ["good", "bad"]},
    )
    (folder / "run.yaml").write_text(to_yaml(config))
    found, tokenizer, chunks = survey(config), load_tokenizer(str(tiny_model)), dict[str, store.Chunk]()
    for split, its_rows in (("train", rows + fox), ("eval", held_out)):
        table = chunk_table(tokenized(its_rows, tokenizer), f"{split}.jsonl")
        gaps = pa.array(range(1, table.num_rows + 1), store.SCORE_GAP.type)
        chunks[split] = store.write_chunk(
            found.uri, store.chunk_name(split, 0), table.append_column(store.SCORE_GAP, gaps)
        )
    counts = dict.fromkeys(store.COUNTS, 0) | {"rows": 32, "pairs": 30, "eval_pairs": 2, "with_scores": 32}
    made = store.PairStore(found.uri, (chunks["train"],), (chunks["eval"],), counts)
    store.write_manifest(made, found.about)
    return str(folder / "run.yaml")


def shown(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["data", *arguments], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    return done.stdout


def test_tables(config_file: str) -> None:
    text = shown(config_file)
    assert "lengths in tokens" in text
    assert "scores of 32 pairs: the best answer's less the worst's" in text
    (left_out,) = (line for line in text.splitlines() if "data.min_score_gap" in line)
    # Gaps 1 to 30 and 1 to 2: a quarter of 32 do not exceed 6, and 6 + 2 are at most 6.
    assert [cell.strip() for cell in left_out.split("│")[2:-1]][2:5] == ["8", "16", "24"]
    assert "near-duplicates" not in text


def test_near_duplicates(config_file: str) -> None:
    text = shown(config_file, "--near-duplicates")
    assert "share 80% of their runs of 5 tokens" in text
    rows = {cells[1].strip(): cells[2].strip() for line in text.splitlines() if len(cells := line.split("│")) == 5}
    assert rows["training pairs like another one"] == "2"
    assert rows["held-out pairs like a training pair"] == "1"
    assert "eval.jsonl row " in text


def test_json(config_file: str) -> None:
    plain: dict[str, Any] = json.loads(shown(config_file, "--json"))
    assert "near_duplicates" not in plain
    assert plain["comparisons"] == 32
    assert plain["score_gaps"]["left_out"][-1] == plain["score_gaps"]["pairs"] == 32
    more = json.loads(shown(config_file, "--json", "--near-duplicates"))
    assert more.pop("near_duplicates").keys() == {"train", "eval", "train_examples", "eval_examples"}
    assert more == plain
