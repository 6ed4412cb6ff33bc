"""What nobody uses, and nothing else, is removed."""

from pathlib import Path

import numpy as np
import pytest
from helpers import chunk_table

from dpo_ray import storage
from dpo_ray.pairs import store
from dpo_ray.pairs.tokenize import pair_id
from dpo_ray.reference import claims
from dpo_ray.reference.claims import Claims
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.reference.usage import note_use, remove_unused, unused
from dpo_ray.types import TokenizedPair


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.02)
    monkeypatch.setattr(claims, "LOOK_S", 0.02)


def pair_store(uri: str, *numbers: int) -> store.PairStore:
    """A chunk per number: equal numbers are equal chunks."""
    chunks = []
    for index, number in enumerate(numbers):
        parts = [np.array([number, part], np.int32) for part in range(3)]
        pair = TokenizedPair(pair_id(parts[0], tuple(parts[1:])), parts[0], tuple(parts[1:]))
        chunks.append(store.write_chunk(uri, store.chunk_name("train", index), chunk_table([pair])))
    made = store.PairStore(uri, tuple(chunks), (), dict.fromkeys(store.COUNTS, 0))
    store.write_manifest(made, {})
    return made


def score(reference: ReferenceStore, pairs: store.PairStore) -> None:
    for chunk in pairs.train:
        ids = [pair.pair_id for pair in store.read_chunk(pairs.uri, chunk)]
        reference.put(chunk, ids, [np.zeros(2, np.float32)] * len(ids))


def test_only_what_no_living_run_reads_goes(tmp_path: Path) -> None:
    """One run has chunks 1 and 2, another 2 and 3, and is gone: 3 goes."""
    reference = ReferenceStore(str(tmp_path / "reference"))
    kept, gone = pair_store(str(tmp_path / "kept"), 1, 2), pair_store(str(tmp_path / "gone"), 2, 3)
    for run, pairs in (("alive", kept), ("dead", gone)):
        score(reference, pairs)
        note_use(reference, run, pairs.uri)
    found = unused(reference.uri, alive="alive".__eq__)
    assert (found.keys, found.kept, found.whole) == ((gone.train[1].key,), 2, False)
    remove_unused(found)
    assert reference.missing([*kept.train, *gone.train]) == [gone.train[1]]
    assert unused(reference.uri, alive="alive".__eq__).keys == ()
    found = unused(reference.uri, alive=lambda run: False)
    assert found.whole
    remove_unused(found)
    assert not storage.list_names(reference.uri)


def test_nothing_goes_while_somebody_scores(tmp_path: Path) -> None:
    reference = ReferenceStore(str(tmp_path / "reference"))
    score(reference, pair_store(str(tmp_path / "pairs"), 1))
    note_use(reference, "dead", str(tmp_path / "pairs"))
    filler = Claims(reference.uri, "run")
    found = unused(reference.uri, alive=lambda run: False)
    assert (found.keys, found.whole) == ((), False)
    filler.close()
    assert unused(reference.uri, alive=lambda run: False).whole


def test_a_store_of_nobody_knows_whom_stays(tmp_path: Path) -> None:
    reference = ReferenceStore(str(tmp_path / "reference"))
    score(reference, pair_store(str(tmp_path / "pairs"), 1))
    found = unused(reference.uri, alive=lambda run: False)
    assert (found.keys, found.whole) == ((), False)
