"""Numbers about a pair store, from pairs whose numbers are known."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import chunk_table
from rich.console import Console

from dpo_ray import storage
from dpo_ray.display import statistics_tables
from dpo_ray.errors import DataError
from dpo_ray.pairs import statistics, store
from dpo_ray.pairs.statistics import PERCENTILES, bars, describe
from dpo_ray.pairs.tokenize import pair_id
from dpo_ray.report.page import write_data_page
from dpo_ray.types import TokenizedPair


def pair(number: int, prompt: int, *answers: int) -> TokenizedPair:
    """A pair of these lengths; `number` tells prompts of equal length apart."""
    tokens = [np.full(size, number + k, np.int32) for k, size in enumerate((prompt, *answers))]
    return TokenizedPair(pair_id(tokens[0], tokens[1:]), tokens[0], tuple(tokens[1:]))


def test_numbers_of_a_store(tmp_path: Path) -> None:
    """Four comparisons: 5 against 3, 2 against 2, 4 against 6 and 4 against 1; one prompt stands in two pairs."""
    first, second = [pair(1, 3, 5, 3), pair(7, 4, 2, 2)], [pair(1, 3, 4, 6, 1)]
    chunks = [
        store.write_chunk(str(tmp_path), store.chunk_name(split, 0), chunk_table(pairs))
        for split, pairs in (("train", first), ("eval", second))
    ]
    reasons = ["column 'chosen' is null, at 3", "column 'rejected' is null, at 44", "not UTF-8"]
    storage.write_json_lines(str(tmp_path / "rejects" / "part.jsonl"), [{"reason": each} for each in reasons])
    counts = dict.fromkeys(store.COUNTS, 0) | {"rows": 6}
    seen = list[tuple[int, int]]()
    made = store.PairStore(str(tmp_path), (chunks[0],), (chunks[1],), counts)
    found = describe(made, lambda *each: seen.append(each))
    assert seen == [(1, 2), (2, 2)]
    assert (found.comparisons, found.prompts, found.answers) == (4, 2, {2: 2, 3: 1})
    assert (found.chosen_longer, found.chosen_shorter, found.more_tokens) == (0.5, 0.25, (2 + 0 - 2 + 3) / 4)
    assert found.lengths["prompt"].histogram == [0, 0, 0, 2, 1]
    assert found.lengths["chosen"].mean == pytest.approx(11 / 3)
    assert found.lengths["rejected"].histogram == [0, 1, 1, 1, 0, 0, 1]
    at = dict(zip(PERCENTILES, found.lengths["rejected"].percentiles, strict=True))
    assert (at[1], at[25], at[50], at[75], at[95], at[100]) == (1, 1, 2, 3, 6, 6)
    assert found.rejects == {"column _ is null, at _": 2, "not UTF-_": 1}
    assert found.rejects_read == 3


def test_of_many_rejects_a_sample_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 files: every fourth one; of each no more than its share of the bytes, which here is two lines and a half."""
    chunk = store.write_chunk(str(tmp_path), store.chunk_name("train", 0), chunk_table([pair(1, 3, 5, 3)]))
    made = store.PairStore(str(tmp_path), (chunk,), (), dict.fromkeys(store.COUNTS, 0) | {"rejects": 2000})
    line = {"reason": "not UTF-8"}
    for number in range(200):
        reasons = [line, {"reason": "late"}] if number % 4 else [line] * 10
        storage.write_json_lines(str(tmp_path / "rejects" / f"part-{number:03d}.jsonl"), reasons)
    found = describe(made)
    assert (found.rejects_read, found.rejects) == (500, {"not UTF-_": 500})
    assert "in a sample of 500 of 2,000" in page_of(found, tmp_path)
    monkeypatch.setattr(statistics, "REJECT_BYTES", 50 * 5 * (len(json.dumps(line)) + 1) // 2)
    assert describe(made).rejects_read == 100
    all_read = dataclasses.replace(found, counts=found.counts | {"rejects": 500})
    assert "in a sample" not in page_of(all_read, tmp_path)


def page_of(found: statistics.Statistics, folder: Path) -> str:
    """What the page and the terminal's tables say, which is the same."""
    write_data_page(found, str(folder / "data.html"))
    page, console = (folder / "data.html").read_text(), Console(width=200, record=True, file=io.StringIO())
    for table in statistics_tables(found):
        console.print(table)
    assert ("in a sample" in page) == ("in a sample" in console.export_text())
    return page


def test_gaps_of_scores(tmp_path: Path) -> None:
    """Gaps 1, 2, 2, 3 and 9 of a hundredth; one pair has no scores."""
    gaps = np.array([2, np.nan, 9, 1, 3, 2], np.float32) / np.float32(100)
    table = chunk_table([pair(number, 3, 2, 1) for number in range(len(gaps))])
    column = pa.array(gaps, store.SCORE_GAP.type, from_pandas=True)
    chunk = store.write_chunk(str(tmp_path), store.chunk_name("train", 0), table.append_column(store.SCORE_GAP, column))
    counts = dict.fromkeys(store.COUNTS, 0)
    assert describe(store.PairStore(str(tmp_path), (chunk,), (), counts)).score_gaps is None
    found = describe(store.PairStore(str(tmp_path), (chunk,), (), counts | {"with_scores": 5})).score_gaps
    assert found is not None
    assert found.pairs == 5
    assert dict(zip(PERCENTILES, found.percentiles, strict=True)) == pytest.approx(
        {1: 0.01, 5: 0.01, 25: 0.02, 50: 0.02, 75: 0.03, 95: 0.09, 99: 0.09, 100: 0.09}
    )
    assert found.left_out == [1, 1, 3, 3, 4, 5, 5, 5]
    (tmp_path / "sources" / chunk.name).write_bytes(b"")
    with pytest.raises(
        DataError, match="the scores that came with the pairs are missing or damaged; remove .*manifest"
    ):
        describe(store.PairStore(str(tmp_path), (chunk,), (), counts | {"with_scores": 5}))


def test_bars_cover_every_length_once() -> None:
    assert bars([1, 2, 3, 4, 5], 2) == [(0, 2, 6), (3, 4, 9)]
    assert bars([1, 2], 12) == [(0, 0, 1), (1, 1, 2)]
