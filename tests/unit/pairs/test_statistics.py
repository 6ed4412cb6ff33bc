"""Numbers about a pair store, from pairs whose numbers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import chunk_table

from dpo_ray import storage
from dpo_ray.errors import DataError
from dpo_ray.pairs import store
from dpo_ray.pairs.statistics import PERCENTILES, bars, describe
from dpo_ray.pairs.tokenize import pair_id
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
