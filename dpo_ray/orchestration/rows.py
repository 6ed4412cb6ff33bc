"""What the tasks of `prepare` do to rows: read, parse, tokenize. Light to import, for every task imports it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray import storage
from dpo_ray.errors import DataError, RowError
from dpo_ray.model.files import load_tokenizer
from dpo_ray.pairs import store
from dpo_ray.pairs.formats import parse_row
from dpo_ray.pairs.tokenize import PairTokenizer

ROWS_PER_READ = 1000
# Marks in the column `reason` of rows that are neither pairs nor rejects.
END, IDENTICAL = "end of file", "identical"
_RAW = pa.schema([("source", pa.string()), ("row", pa.int64()), ("split", pa.string()), ("text", pa.string())])
_TOKENIZED = pa.schema([*_RAW, ("reason", pa.string()), *store.PAIR_SCHEMA])


def read(files: dict[str, np.ndarray]) -> Iterator[pa.Table]:
    """Rows of files as JSON text."""
    for uri, split in zip(files["uri"], files["split"], strict=True):
        yield from _read_file(str(uri), str(split))


def _read_file(uri: str, split: str) -> Iterator[pa.Table]:
    """Rows of a file as JSON text, numbered from 1, some at a time; at the end a row without text.

    With it no block is ever empty: Ray Data forgets the schema of an empty block, and its shuffle then fails.
    """
    number, texts = 0, list[str]()
    try:
        for text in _parquet_rows(uri) if uri.endswith(".parquet") else _lines(uri):
            texts.append(text)
            if len(texts) == ROWS_PER_READ:
                yield _raw(uri, split, number, texts)
                number, texts = number + len(texts), []
    except (OSError, EOFError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{uri}: cannot read past row {number + len(texts)}: {error}; restore the file") from None
    yield _raw(uri, split, number, [*texts, None])


def _raw(uri: str, split: str, before: int, texts: Sequence[str | None]) -> pa.Table:
    numbers = range(before + 1, before + 1 + len(texts))
    return pa.table({"source": [uri] * len(texts), "row": numbers, "split": [split] * len(texts), "text": texts}, _RAW)


def _lines(uri: str) -> Iterator[str]:
    with storage.open_read(uri) as file:
        for line in file:
            yield line.decode("utf-8").rstrip("\r\n")


def _parquet_rows(uri: str) -> Iterator[str]:
    with storage.open_read(uri) as file:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=ROWS_PER_READ):
            for row in batch.to_pylist():
                yield json.dumps(row, default=str)


@functools.cache
def _pair_tokenizer(uri: str, chat_template: Any, max_length: int) -> PairTokenizer:
    return PairTokenizer(load_tokenizer(uri), chat_template, max_length)


def tokenize_rows(
    batch: pa.Table, tokenizer_uri: str, chat_template: str, max_length: int, eval_fraction: float
) -> pa.Table:
    """Pairs as tokens; a row that cannot become one keeps its text and gets a reason."""
    tokenize = _pair_tokenizer(tokenizer_uri, chat_template, max_length)
    rows: list[dict[str, Any]] = []
    for raw in batch.to_pylist():
        if raw["text"] is None or not raw["text"].strip():
            rows.append({**raw, "reason": END})
            continue
        try:
            pair = tokenize(parse_row(_object(raw["text"])))
        except RowError as error:
            rows.append({**raw, "reason": str(error)})
            continue
        identical = len({answer.tobytes() for answer in pair.answers}) < len(pair.answers)
        split = "eval" if store.held_out(pair.pair_id, eval_fraction) else raw["split"]
        rows.append(
            {
                **raw,
                "split": split,
                "text": None,
                "reason": IDENTICAL if identical else None,
                "pair_id": pair.pair_id,
                "prompt": pair.prompt,
                "answers": list(pair.answers),
            }
        )
    return pa.table({name: [row.get(name) for row in rows] for name in _TOKENIZED.names}, schema=_TOKENIZED)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RowError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RowError(f"not a JSON object but {type(value).__name__}")
    return value
