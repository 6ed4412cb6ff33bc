"""The feed: batches come as soon as their chunks are scored, joined with the right scores."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import chunk_table

from dpo_ray.errors import ReferenceMismatchError
from dpo_ray.pairs import store
from dpo_ray.pairs.pack import Costs
from dpo_ray.pairs.plan import Plan
from dpo_ray.pairs.tokenize import pair_id
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.reference.versions import References, Version, version_store
from dpo_ray.training.feed import Feed
from dpo_ray.types import Attempt, TokenizedPair


class NobodyScores(Exception):
    """Raised instead of waiting."""


def refuse() -> None:
    raise NobodyScores


@pytest.fixture
def chunks(tmp_path: Path) -> tuple[store.Chunk, ...]:
    rng = np.random.default_rng(0)
    made = []
    for index, size in enumerate((7, 9, 8)):
        pairs = []
        for _ in range(size):
            prompt, *answers = (rng.integers(0, 99, rng.integers(1, 9), dtype=np.int32) for _ in range(3))
            pairs.append(TokenizedPair(pair_id(prompt, tuple(answers)), prompt, tuple(answers)))
        made.append(store.write_chunk(str(tmp_path), store.chunk_name("train", index), chunk_table(pairs)))
    return tuple(made)


def still(reference: ReferenceStore) -> References:
    """A reference that does not move."""
    return References(reference, "", None, Attempt(0, 1, 0, None, 1, "test", "now"), "packed")


def score_of(pair: bytes) -> list[float]:
    """A score that says whose it is."""
    return [float(pair[0]), -float(pair[1])]


def score(reference: ReferenceStore, folder: Path, chunk: store.Chunk) -> None:
    ids = [pair.pair_id for pair in store.read_chunk(str(folder), chunk)]
    reference.put(chunk, ids, [np.array(score_of(i), np.float32) for i in ids])


def test_a_batch_waits_for_its_own_chunks_only(tmp_path: Path, chunks: tuple[store.Chunk, ...]) -> None:
    """24 pairs in batches of 4: with the first chunk of the plan scored, exactly the batches within it come."""
    plan = Plan(5, chunks, 4, 6)
    reference = ReferenceStore(str(tmp_path / "reference"))
    feed = Feed(plan, str(tmp_path), still(reference), refuse, Costs())
    order = [take.chunk for take in plan.takes(0)]
    done = 0
    for number in range(1, 4):
        score(reference, tmp_path, order[number - 1])
        complete = sum(chunk.num_pairs for chunk in order[:number]) // 4
        batches = feed.rank_batches(done, 0, 1, 100)
        for step in range(done + 1, complete + 1):
            assert next(batches).step == step
        if number < 3:
            with pytest.raises(NobodyScores):
                next(batches)
        done = complete
    assert reference.missing(chunks) == []


def test_scores_belong_to_their_answers(tmp_path: Path, chunks: tuple[store.Chunk, ...]) -> None:
    reference = ReferenceStore(str(tmp_path / "reference"))
    for chunk in chunks:
        score(reference, tmp_path, chunk)
    feed = Feed(Plan(5, chunks, 5, 5), str(tmp_path), still(reference), refuse, Costs())
    seen = []
    for batch in feed.rank_batches(0, 0, 1, 60):
        for ids, micro in zip(batch.microbatch_pair_ids, batch.microbatches, strict=True):
            assert micro.ref_logps is not None
            assert micro.ref_logps.tolist() == [value for i in ids for value in score_of(i)]
        seen += batch.pair_ids
    expected = []
    for take in feed.plan.takes(0):
        ids = [pair.pair_id for pair in store.read_chunk(str(tmp_path), take.chunk)]
        expected += [ids[index] for index in feed.plan.pair_order(take, 0, ids)]
    assert seen == expected


def test_scores_of_tokens_become_those_of_answers(tmp_path: Path, chunks: tuple[store.Chunk, ...]) -> None:
    """Each token of the n-th answer has -n; half counts what is beyond the shorter answer."""
    reference = ReferenceStore(str(tmp_path / "reference"))
    expected = {}
    for chunk in chunks:
        pairs = store.read_chunk(str(tmp_path), chunk)
        made = [np.repeat(np.array([-1, -2], np.float32), list(map(len, pair.answers))) for pair in pairs]
        reference.put(chunk, [pair.pair_id for pair in pairs], made)
        for pair in pairs:
            lengths = list(map(len, pair.answers))
            expected[pair.pair_id] = [
                -n * (min(lengths) + (k - min(lengths)) / 2) for n, k in zip((1, 2), lengths, strict=True)
            ]
    feed = Feed(Plan(5, chunks, 5, 5), str(tmp_path), still(reference), refuse, Costs(), ld_alpha=0.5)
    for batch in feed.rank_batches(0, 0, 1, 60):
        for ids, micro in zip(batch.microbatch_pair_ids, batch.microbatches, strict=True):
            assert micro.ref_logps is not None
            assert micro.ref_logps.tolist() == [value for i in ids for value in expected[i]]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_a_batch(tmp_path: Path, chunks: tuple[store.Chunk, ...], world_size: int) -> None:
    feed = Feed(Plan(5, chunks, 5, 5), str(tmp_path), None, refuse, Costs())
    whole = list(feed.rank_batches(0, 0, 1, 60))
    parts = [list(feed.rank_batches(0, rank, world_size, 60)) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert all(part[step].pair_ids == batch.pair_ids for part in parts)
        own = [i for part in parts for ids in part[step].microbatch_pair_ids for i in ids]
        assert sorted(own) == sorted(batch.pair_ids)
        assert len({len(part[step].microbatches) for part in parts}) == 1


def test_scores_of_other_pairs_are_refused(tmp_path: Path, chunks: tuple[store.Chunk, ...]) -> None:
    reference = ReferenceStore(str(tmp_path / "reference"))
    ids = [pair.pair_id for pair in store.read_chunk(str(tmp_path), chunks[0])]
    scores = [np.zeros(2, np.float32)] * len(ids)
    reference.put(chunks[0], ids[::-1], scores)
    with pytest.raises(ReferenceMismatchError, match="other pairs"):
        reference.get(chunks[0], ids)
    reference.put(chunks[0], ids, scores)
    path = tmp_path / "reference" / f"{chunks[0].key}.parquet"
    data = bytearray(path.read_bytes())
    data[40] ^= 255
    path.write_bytes(data)
    with pytest.raises(ReferenceMismatchError):
        reference.get(chunks[0], ids)


def test_scores_that_went_are_asked_for(
    tmp_path: Path, chunks: tuple[store.Chunk, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody removed what a filler has seen: a reader that has waited long enough says so, and only then."""
    monkeypatch.setattr("dpo_ray.reference.store.MISSING_S", 0.1)
    reference = ReferenceStore(str(tmp_path / "reference"))
    ids = [pair.pair_id for pair in store.read_chunk(str(tmp_path), chunks[0])]
    began = time.monotonic()

    def check() -> None:
        if reference.refused():
            assert time.monotonic() - began > 0.1
            assert "is not there" in str(reference.refusal(chunks[0].key))
            score(reference, tmp_path, chunks[0])

    reference.wait(chunks[0], ids, check, poll_s=0.02)
    assert reference.refused() == set()


def test_refused_scores_are_asked_for_again(tmp_path: Path, chunks: tuple[store.Chunk, ...]) -> None:
    """A reader that cannot use a file says so in the store, waits, and takes the new one."""
    reference = ReferenceStore(str(tmp_path / "reference"))
    for chunk in chunks:
        score(reference, tmp_path, chunk)
    path = tmp_path / "reference" / f"{chunks[1].key}.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    ids = [pair.pair_id for pair in store.read_chunk(str(tmp_path), chunks[1])]
    looks = 0

    def check() -> None:
        nonlocal looks
        looks += 1
        assert reference.missing(chunks) == [chunks[1]]
        assert reference.refused() == {chunks[1].key}
        assert "damaged" in str(reference.refusal(chunks[1].key))
        assert not reference.has(chunks[1])
        if looks == 2:
            score(reference, tmp_path, chunks[1])

    scores, waited_s = reference.wait(chunks[1], ids, check, poll_s=0.01)
    assert [each.tolist() for each in scores] == [score_of(i) for i in ids]
    assert looks == 2
    assert waited_s >= 0.02
    assert reference.refused() == set()
    assert reference.missing(chunks) == []


def test_each_step_has_the_scores_of_its_version(tmp_path: Path, chunks: tuple[store.Chunk, ...]) -> None:
    """Batches of 4 out of chunks of 7 to 9, and a reference that moves every 2 steps: it does so within chunks."""
    start = ReferenceStore(str(tmp_path / "reference"))
    # Attempt 3 began after step 3, with what attempt 1 had made after step 2.
    attempt = Attempt(3, 1, 3, None, 1, "test", "now", reference_attempt=1)
    references = References(start, str(tmp_path), 2, attempt, "packed")
    later = {n: version_store(str(tmp_path), Version(n, by), "packed") for n, by in ((1, 1), (2, 3))}
    stores = {0: start, **later}
    for number, each in stores.items():
        for chunk in chunks:
            ids = [pair.pair_id for pair in store.read_chunk(str(tmp_path), chunk)]
            each.put(chunk, ids, [np.array([number, -number], np.float32) for _ in ids])
    feed = Feed(Plan(5, chunks, 4, 6), str(tmp_path), references, refuse, Costs())
    seen = {}
    for batch in feed.rank_batches(0, 0, 1, 1000):
        scores = [micro.ref_logps for micro in batch.microbatches]
        seen[batch.step] = {abs(float(value)) for each in scores if each is not None for value in each}
    assert seen == {1: {0.0}, 2: {0.0}, 3: {1.0}, 4: {1.0}, 5: {2.0}, 6: {2.0}}
    # An evaluation after step 4 compares with what step 4 was trained with, whatever batch it is at.
    held = replace(feed, scored_as=4)
    assert {abs(float(v)) for b in held.rank_batches(0, 0, 1, 1000) for m in b.microbatches for v in m.ref_logps} == {1}
