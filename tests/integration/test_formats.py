"""The table of formats: each is recognised from its columns, shown, and gives the same pairs as the plain form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import dpo_ray_command, tiny_config
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_ray.config import Config, to_yaml
from dpo_ray.orchestration.prepare import prepare
from dpo_ray.orchestration.trainer import start_ray
from dpo_ray.orchestration.watch import SourcePreview, Watcher
from dpo_ray.pairs.store import pairs_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SYSTEM = "Be brief."
MATERIAL = "The sky was red."
# What a row says: a prompt and two answers.
FACTS = [(f"Count from {n} to {n + 3}, please", f"{n}, {n + 1}, {n + 2}, {n + 3}", f"{n} {n}") for n in range(24)]

Row = dict[str, Any]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def speaker(name: str, value: str) -> dict[str, str]:
    return {"from": name, "value": value}


# name -> (format that is recognised, row of a fact, columns that have to be named, what the row's system turn says,
# what its prompt is followed by)
FORMATS: dict[str, tuple[str, Callable[[str, str, str], Row], dict[str, str], str, str]] = {
    "strings": ("text", lambda p, c, r: {"prompt": p, "chosen": c, "rejected": r}, {}, "", ""),
    "messages": (
        "messages",
        lambda p, c, r: {
            "prompt": [turn("user", p)],
            "chosen": [turn("assistant", c)],
            "rejected": [turn("assistant", r)],
        },
        {},
        "",
        "",
    ),
    "whole conversations": (
        "conversations",
        lambda p, c, r: {
            "chosen": [turn("user", p), turn("assistant", c)],
            "rejected": [turn("user", p), turn("assistant", r)],
        },
        {},
        "",
        "",
    ),
    "whole dialogues as text": (
        "dialogue",
        lambda p, c, r: {
            "chosen": f"\n\nHuman: {p}\n\nAssistant: {c}",
            "rejected": f"\n\nHuman: {p}\n\nAssistant: {r}",
        },
        {},
        "",
        "",
    ),
    "repeated prompt, as ultrafeedback_binarized": (
        "messages",
        lambda p, c, r: {
            "prompt": p,
            "chosen": [turn("user", p), turn("assistant", c)],
            "rejected": [turn("user", p), turn("assistant", r)],
            "score_chosen": 8.0,
        },
        {},
        "",
        "",
    ),
    "repeated prompt as text": (
        "repeated",
        lambda p, c, r: {"prompt": p, "chosen": p + c, "rejected": p + r},
        {},
        "",
        "",
    ),
    "system column": (
        "text",
        lambda p, c, r: {"system": SYSTEM, "question": p, "chosen": c, "rejected": r},
        {},
        SYSTEM,
        "",
    ),
    "input column": (
        "text",
        lambda p, c, r: {"instruction": p, "input": MATERIAL, "chosen": c, "rejected": r},
        {},
        "",
        "\n\n" + MATERIAL,
    ),
    "ShareGPT": (
        "messages",
        lambda p, c, r: {
            "conversations": [speaker("human", p)],
            "chosen": speaker("gpt", c),
            "rejected": speaker("gpt", r),
        },
        {},
        "",
        "",
    ),
    "columns named by the user": (
        "text",
        lambda p, c, r: {"ask": p, "good": c, "bad": r},
        {"prompt": "ask", "chosen": "good", "rejected": "bad"},
        "",
        "",
    ),
}


def write(folder: Path, rows: list[Row], suffix: str = ".jsonl") -> Path:
    path = folder / f"pairs{suffix}"
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".jsonl.zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(text)
    else:
        path.write_bytes(text)
    return path


Prepared = tuple[dict[bytes, tuple[str, ...]], str]


def config_of(folder: Path, model: Path, pairs: Path, columns: dict[str, str] | None, **data: Any) -> Config:
    sections: dict[str, Any] = {"data": {"eval_fraction": 0.0, **data}, "train": {"eval_every_steps": None}}
    if columns:
        sections["data"]["columns"] = columns
    return tiny_config(str(folder / "s"), "run", model, str(pairs), **sections)


def prepared(folder: Path, model: Path, pairs: Path, columns: dict[str, str] | None = None, **data: Any) -> Prepared:
    """Runs `dpo-ray prepare`; returns prompt and answers by content id, decoded, and what was shown."""
    (folder / "run.yaml").write_text(to_yaml(config_of(folder, model, pairs, columns, **data)))
    done = dpo_ray_command("prepare", str(folder / "run.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    return in_store(folder, model), " ".join(done.stdout.split())


def prepared_here(folder: Path, model: Path, pairs: Path, columns: dict[str, str] | None = None) -> Prepared:
    """The same in this process."""
    config, shown = config_of(folder, model, pairs, columns), list[str]()

    class Reader(Watcher):
        def source(self, preview: SourcePreview) -> None:
            shown.append(f"format {preview.reading.format},")
            shown.extend(text for example in preview.examples for text in (example.prompt, *example.answers))

    start_ray(config)
    prepare(config, Reader())
    return in_store(folder, model), " ".join(" ".join(shown).split())


def in_store(folder: Path, model: Path) -> dict[bytes, tuple[str, ...]]:
    """Prompt and answers of what was prepared, decoded, by content id."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs_found = {}
    for path in (folder / "s" / "store" / "pairs").glob("*/train-*.parquet"):
        for pair in pairs_of(pq.read_table(path)):
            pairs_found[pair.pair_id] = tuple(tokenizer.decode(part) for part in pair.parts)
    return pairs_found


def rendered(tokenizer: PreTrainedTokenizerBase, system: str, after: str) -> set[tuple[str, str]]:
    """The template's own rendering of every fact with either answer."""
    start = [turn("system", system)] if system else []

    def whole(prompt: str, answer: str) -> str:
        turns = [*start, turn("user", prompt + after), turn("assistant", answer)]
        return str(tokenizer.apply_chat_template(turns, tokenize=False))

    return {(whole(prompt, chosen), whole(prompt, rejected)) for prompt, chosen, rejected in FACTS}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(tmp_path: Path, tiny_model: Path, shared_cluster: None, name: str) -> None:
    """Decoded prompt + completion is the template's rendering, byte for byte, so that content ids are equal too."""
    recognised, row, columns, system, after = FORMATS[name]
    path = write(tmp_path, [row(*fact) for fact in FACTS])
    # A command takes four times as long as what it does.
    by_command = name in ("strings", "columns named by the user")
    found, shown = (prepared if by_command else prepared_here)(tmp_path, tiny_model, path, columns)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = {(prompt + chosen, prompt + rejected) for prompt, chosen, rejected in found.values()}
    assert texts == rendered(tokenizer, system, after)
    assert len(found) == len(FACTS)
    assert f"format {recognised}," in shown
    first_prompt, first_chosen, _ = FACTS[0]
    assert first_prompt in shown
    assert first_chosen in shown


def test_the_same_rows_in_two_formats_have_the_same_ids(tmp_path: Path, tiny_model: Path, shared_cluster: None) -> None:
    ids = set()
    for number, name in enumerate(("strings", "whole dialogues as text")):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = write(folder, [FORMATS[name][1](*fact) for fact in FACTS])
        ids.add(frozenset(prepared(folder, tiny_model, path)[0]))
    assert len(ids) == 1


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl.zst", ".parquet"])
def test_pre_tokenized_rows(tmp_path: Path, tiny_model: Path, shared_cluster: None, suffix: str) -> None:
    """Tokens as they are: nothing added, nothing cut."""
    rows = [{"prompt_ids": [n, 7, 8], "chosen_ids": [n, 1], "rejected_ids": [2]} for n in range(20)]
    found, shown = prepared(tmp_path, tiny_model, write(tmp_path, rows, suffix))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected = {tuple(tokenizer.decode(row[name]) for name in row) for row in rows}
    assert set(found.values()) == expected
    assert "format tokens," in shown


def test_texts_that_begin_alike(tmp_path: Path, tiny_model: Path, shared_cluster: None) -> None:
    """Without a template: the common beginning, up to the end of a word, is the prompt."""
    rows = [{"chosen": f"Q: {p}\nA: it is {c}", "rejected": f"Q: {p}\nA: it is {r}"} for p, c, r in FACTS]
    found, shown = prepared(tmp_path, tiny_model, write(tmp_path, rows), chat_template="none")
    end = AutoTokenizer.from_pretrained(tiny_model).eos_token
    texts = {(prompt + chosen, prompt + rejected) for prompt, chosen, rejected in found.values()}
    assert texts == {(row["chosen"] + end, row["rejected"] + end) for row in rows}
    assert all(prompt.endswith("A: it is") for prompt, _, _ in found.values())
    assert "format continuation," in shown
