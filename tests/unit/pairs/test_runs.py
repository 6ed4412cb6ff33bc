"""The external sort: whatever the runs, a range holds its ids, sorted, each once."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import chunk_table

from dpo_ray.pairs import runs, store
from dpo_ray.pairs.tokenize import pair_id
from dpo_ray.types import TokenizedPair


def make_pairs(num: int, seed: int) -> list[TokenizedPair]:
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(num):
        prompt, *answers = (rng.integers(0, 999, rng.integers(1, 9), dtype=np.int32) for _ in range(3))
        pairs.append(TokenizedPair(pair_id(prompt, tuple(answers)), prompt, tuple(answers)))
    return pairs


def write(folder: Path, name: str, pairs: list[TokenizedPair]) -> runs.Run:
    table = chunk_table(pairs, name)
    order = list(range(len(pairs)))
    random.Random(0).shuffle(order)
    return runs.write_run(str(folder / name), table.take(pa.array(order)))


@pytest.mark.parametrize("ranges", [1, 7, 64])
def test_ranges_hold_every_pair_once_and_in_order(tmp_path: Path, ranges: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of 700 and 300 pairs with 100 in common, in slices of 16: 900 pairs, those in both from the first."""
    monkeypatch.setattr(runs, "SLICE_PAIRS", 16)
    one, two = make_pairs(700, 1), make_pairs(200, 2)
    two += one[:100]
    written = [write(tmp_path, "b", one), write(tmp_path, "a", two)]
    read: list[TokenizedPair] = []
    num_bytes = 0
    for index in range(ranges):
        low, high = (store.chunk_start(bound, ranges) for bound in (index, index + 1))
        parts = runs.extents(written, low, high)
        num_bytes += sum(part.stop - part.start for part in parts)
        table = runs.read_range(parts, low, high)
        sources = dict(zip(table["pair_id"].to_pylist(), table["source"].to_pylist(), strict=True))
        assert all(sources[pair.pair_id] == "a" for pair in two if pair.pair_id in sources)
        read += store.pairs_of(table)
    unique = {pair.pair_id: pair for pair in one + two}
    assert [pair.pair_id for pair in read] == sorted(unique)
    for pair in read:
        assert [part.tolist() for part in pair.parts] == [part.tolist() for part in unique[pair.pair_id].parts]
    whole = sum((tmp_path / name).stat().st_size for name in "ab")
    assert num_bytes <= whole + 2 * ranges * whole / (900 / 16)  # At most one slice too much at either end.


def test_bounds_on_a_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids whose first 8 bytes are equal stay together, also where a slice ends between them."""
    monkeypatch.setattr(runs, "SLICE_PAIRS", 2)
    tokens = np.array([1], np.int32)
    heads = [0, 5, 5, 5, 2**64 - 1]
    pairs = [
        TokenizedPair(head.to_bytes(8, "big") + number.to_bytes(8, "big"), tokens, (tokens, tokens))
        for number, head in enumerate(heads)
    ]
    run = write(tmp_path, "run", pairs)

    def ids(low: int, high: int) -> list[bytes]:
        return runs.read_range(runs.extents([run], low, high), low, high)["pair_id"].to_pylist()

    assert ids(5, 6) == [pair.pair_id for pair in pairs[1:4]]
    assert ids(0, 5) == [pairs[0].pair_id]
    assert ids(6, 2**64) == [pairs[4].pair_id]
    assert ids(6, 7) == []
