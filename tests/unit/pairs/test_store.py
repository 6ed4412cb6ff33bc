"""The pair store: bytes that depend on the pairs alone."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import chunk_table

from dpo_ray import storage
from dpo_ray.errors import DataError, StorageError
from dpo_ray.pairs import store
from dpo_ray.pairs.tokenize import pair_id
from dpo_ray.types import TokenizedPair


def make_pairs(num: int) -> list[TokenizedPair]:
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(num):
        prompt, *answers = (rng.integers(0, 99, rng.integers(1, 9), dtype=np.int32) for _ in range(3))
        pairs.append(TokenizedPair(pair_id(prompt, tuple(answers)), prompt, tuple(answers)))
    return pairs


def test_same_bytes_wherever_the_pairs_come_from(tmp_path: Path) -> None:
    pairs = make_pairs(40)
    one, two = (
        store.write_chunk(str(tmp_path / source), "train-000000.parquet", chunk_table(pairs, source)) for source in "ab"
    )
    assert one == two
    assert (tmp_path / "a" / one.name).read_bytes() == (tmp_path / "b" / two.name).read_bytes()
    assert one.num_pairs == 40
    places = store.sources_of(str(tmp_path / "b"), two)
    assert places == {pair.pair_id: f"b row {row}" for row, pair in enumerate(sorted(pairs, key=lambda p: p.pair_id))}
    assert one.num_tokens == sum(len(p.prompt) + sum(map(len, p.answers)) for p in pairs)


def test_same_bytes_with_and_without_scores(tmp_path: Path) -> None:
    plain = chunk_table(make_pairs(40))
    gaps = pa.array([0.5] * 39 + [None], pa.float32())
    one, two = (
        store.write_chunk(str(tmp_path / name), "train-000000.parquet", table)
        for name, table in (("plain", plain), ("scored", plain.append_column(store.SCORE_GAP, gaps)))
    )
    assert one == two
    found = store.score_gaps(str(tmp_path / "scored"), two, plain["pair_id"].to_pylist())
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx([0.5] * 39 + [np.nan], nan_ok=True)
    with pytest.raises(DataError, match="the scores that came with the pairs are missing or damaged"):
        store.score_gaps(str(tmp_path / "scored"), two, plain["pair_id"].to_pylist()[::-1])


def test_chunks_are_read_ahead_in_order_and_not_far() -> None:
    chunks = [store.Chunk(str(number), "", "", 1, 1) for number in range(20)]
    read, two = list[str](), threading.Barrier(2)

    def read_one(chunk: store.Chunk) -> int:
        read.append(chunk.name)
        if int(chunk.name) < 2:
            two.wait(timeout=30)  # Breaks where one is read at a time.
        return int(chunk.name)

    for place, number in enumerate(store.read_ahead(read_one, chunks)):
        assert number == place
        assert len(read) <= place + 1 + store.CHUNKS_AHEAD
    assert len(read) == 20


def test_read_back(tmp_path: Path) -> None:
    pairs = make_pairs(40)
    chunk = store.write_chunk(str(tmp_path), "train-000000.parquet", chunk_table(pairs))
    read = store.read_chunk(str(tmp_path), chunk)
    for expected, got in zip(sorted(pairs, key=lambda p: p.pair_id), read, strict=True):
        assert got.pair_id == expected.pair_id
        assert got.prompt.tolist() == expected.prompt.tolist()
        assert [a.tolist() for a in got.answers] == [a.tolist() for a in expected.answers]


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_chunk_is_refused(tmp_path: Path, harm: str) -> None:
    chunk = store.write_chunk(str(tmp_path), "train-000000.parquet", chunk_table(make_pairs(40)))
    path = tmp_path / chunk.name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    {
        "flip": lambda: path.write_bytes(data),
        "truncate": lambda: path.write_bytes(data[:100]),
        "remove": path.unlink,
    }[harm]()
    # Where nothing at all is to be seen, it is the host that misses the file system: others go on.
    with pytest.raises(StorageError, match="sees nothing of this pair store, which others have read"):
        store.read_chunk(str(tmp_path), chunk)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=chunk.name):
        store.read_chunk(str(tmp_path), chunk)


def test_what_was_damaged_on_its_way_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make_pairs(40)
    chunk = store.write_chunk(str(tmp_path), "train-000000.parquet", chunk_table(pairs))
    sound, reads = storage.read_bytes, list[str]()

    def once_damaged(uri: str) -> bytes:
        reads.append(uri)
        return sound(uri)[: -1 if len(reads) == 1 else None]

    monkeypatch.setattr(storage, "read_bytes", once_damaged)
    assert len(store.read_chunk(str(tmp_path), chunk)) == 40
    assert len(reads) == 2


def test_chunks_hold_about_the_target() -> None:
    """10,000 uniform ids in 10 chunks: mean 1,000, standard deviation 30; 5 of them is 150."""
    chunks = store.num_chunks(10_000, 1000)
    assert chunks == 16  # At least 16 chunks for small data: 10,000 / 625.
    assert store.num_chunks(10**6, 1024) == 977
    assert store.num_chunks(2000, 1024) == 16
    assert store.num_chunks(50, 1024) == 1
    ids = [np.random.default_rng(i).bytes(16) for i in range(10_000)]
    chunk_of = [int.from_bytes(i[:8], "big") * 10 >> 64 for i in ids]
    counts = np.bincount(chunk_of, minlength=10)
    assert counts.sum() == 10_000
    assert abs(counts - 1000).max() < 150
    starts = [store.chunk_start(index, 10) for index in range(11)]
    assert starts[-1] == 2**64
    for pair, chunk in zip(ids, chunk_of, strict=True):
        assert starts[chunk] <= int.from_bytes(pair[:8], "big") < starts[chunk + 1]
    assert abs(sum(store.held_out(i, 0.2) for i in ids) - 2000) < 200


def test_a_store_exists_when_its_manifest_does(tmp_path: Path) -> None:
    chunk = store.write_chunk(str(tmp_path), "train-000000.parquet", chunk_table(make_pairs(5)))
    assert store.open_store(str(tmp_path)) is None
    made = store.PairStore(str(tmp_path), (chunk,), (), {"rows": 5})
    store.write_manifest(made, {})
    assert store.open_store(str(tmp_path)) == replace(made, counts={**dict.fromkeys(store.COUNTS, 0), "rows": 5})
