"""The plan: every pair once per epoch, in an order that depends on seed, epoch and position alone."""

import hashlib
import math

import pytest

from dpo_ray.pairs.plan import Plan, Take, Window, batch_digest, source_weights
from dpo_ray.pairs.store import Chunk


def make_plan(sizes: list[int], batch: int, total_steps: int, seed: int = 0) -> Plan:
    chunks = tuple(Chunk(f"train-{i:06d}.parquet", f"key{i}", "", size, size) for i, size in enumerate(sizes))
    return Plan(seed, chunks, batch, total_steps)


def batches(plan: Plan, position: int = 0) -> list[tuple[int, int, list[tuple[str, int]]]]:
    """(step, epoch, pairs as (chunk, place in the chunk's order)), cut as the feed cuts them."""
    found = []
    for window in plan.windows(position):
        pairs = [(s.chunk.name, place) for s in window.segments for place in range(s.start, s.stop)]
        size = plan.global_batch_pairs
        for index, start in enumerate(range(0, len(pairs), size)):
            found.append((window.first_step + index, window.epoch, pairs[start : start + size]))
    return found


@pytest.mark.parametrize(
    ("sizes", "batch"), [([10, 7, 12], 4), ([3, 2, 1, 4], 8), ([100], 16), ([5, 5], 10), ([1] * 9, 2), ([7], 100)]
)
def test_every_pair_once_per_epoch(sizes: list[int], batch: int) -> None:
    """29 pairs in batches of 4 are 8 steps, the last of 29 - 7 * 4 = 1 pair; likewise for the other sizes."""
    num, steps = sum(sizes), -(-sum(sizes) // batch)
    found = batches(make_plan(sizes, batch, 3 * steps))
    assert [step for step, _, _ in found] == list(range(1, 3 * steps + 1))
    assert [epoch for _, epoch, _ in found] == [epoch for epoch in range(3) for _ in range(steps)]
    for epoch in range(3):
        of_epoch = [pairs for _, e, pairs in found if e == epoch]
        assert [len(pairs) for pairs in of_epoch] == [batch] * (steps - 1) + [num - (steps - 1) * batch]
        seen = [pair for pairs in of_epoch for pair in pairs]
        assert sorted(seen) == sorted(
            (f"train-{i:06d}.parquet", p) for i, size in enumerate(sizes) for p in range(size)
        )


def test_a_start_at_any_position_gives_the_rest_of_the_whole() -> None:
    plan = make_plan([10, 7, 12, 3], 5, 15)
    whole = batches(plan)
    for position in range(16):
        assert batches(plan, position) == whole[position:]


def test_max_steps_cuts_the_last_epoch_and_changes_nothing_before() -> None:
    assert batches(make_plan([10, 7, 12, 3], 5, 9)) == batches(make_plan([10, 7, 12, 3], 5, 14))[:9]


def test_epochs_and_seeds_give_other_orders_of_chunks() -> None:
    sizes = [8] * 20
    orders = {
        tuple(take.chunk.name for take in make_plan(sizes, 8, 1, seed).takes(epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_pair_order_is_the_order_of_keyed_digests() -> None:
    """Written out here anew, so that no change of the plan can move pairs of a run that is under way."""
    ids = [bytes([i]) * 16 for i in range(50)]
    expected = sorted(range(50), key=lambda i: hashlib.blake2b(ids[i], digest_size=16, key=b"3:1").digest())
    plan = make_plan([50], 8, 7, seed=3)
    (take,) = plan.takes(1)
    assert plan.pair_order(take, 1, ids) == expected
    assert plan.pair_order(take, 2, ids) != expected


def test_windows_begin_in_one_chunk_each_and_read_few() -> None:
    """A window's batches begin in its first chunk, so that loading reads a chunk twice at most."""
    plan = make_plan([64] * 10, 20, 32)
    windows: list[Window] = list(plan.windows(0))
    assert len(windows) == 10
    assert max(len(window.segments) for window in windows) == 2


def test_chunks_in_order_of_need_begin_with_the_position() -> None:
    plan = make_plan([10] * 6, 5, 24)
    first, second = ([take.chunk for take in plan.takes(epoch)] for epoch in (0, 1))
    assert plan.chunks_in_order_of_need(0) == first
    # Position 8 is 40 pairs into the first epoch: its chunks 4 and 5, then the second epoch's first new ones.
    later = plan.chunks_in_order_of_need(8)
    assert later[:2] == first[4:]
    assert later[2:] == [chunk for chunk in second if chunk not in later[:2]]


# Of three sources: pairs of each chunk, and how often an epoch takes them: 22 / 2 = 11, 10 * 2 = 20, 9 * 1.25 = 11.25.
MIXTURE = {"train.0": ([8, 8, 6], 0.5), "train.1": ([10], 2.0), "train.2": ([4, 5], 1.25)}
TAKEN = {"train.0": 11, "train.1": 20, "train.2": 11}


def make_mixture(total_steps: int, batch: int = 4) -> Plan:
    chunks = [
        Chunk(f"{part}-{i:06d}.parquet", f"{part}{i}", "", size, size)
        for part, (sizes, _) in MIXTURE.items()
        for i, size in enumerate(sizes)
    ]
    return Plan(3, tuple(chunks), batch, total_steps, tuple(weight for _, weight in MIXTURE.values()))


def ids_of(chunk: Chunk) -> list[bytes]:
    return [hashlib.sha256(f"{chunk.name} {i}".encode()).digest()[:16] for i in range(chunk.num_pairs)]


def test_an_epoch_of_a_mixture_has_each_pair_as_often_as_its_source_says() -> None:
    """Over E epochs E times its weight, rounded down or up; in each epoch the same number of pairs."""
    plan = make_mixture(10**6)
    assert plan.num_pairs == sum(TAKEN.values())
    assert plan.steps_per_epoch == -(-sum(TAKEN.values()) // 4)
    uses = {pair_id: 0 for chunk in plan.chunks for pair_id in ids_of(chunk)}
    for epoch in range(12):
        of_source = dict.fromkeys(TAKEN, 0)
        for take in plan.takes(epoch):
            ids = ids_of(take.chunk)
            order = plan.pair_order(take, epoch, ids)
            assert len(set(order)) == len(order) == take.num_pairs
            of_source[take.chunk.name.split("-")[0]] += len(order)
            for index in order:
                uses[ids[index]] += 1
        assert of_source == TAKEN
        for chunk in plan.chunks:
            part = chunk.name.split("-")[0]
            share = (epoch + 1) * TAKEN[part] / sum(MIXTURE[part][0])
            assert {uses[pair_id] for pair_id in ids_of(chunk)} <= {math.floor(share), math.ceil(share)}


def test_a_mixture_reads_the_chunks_of_a_small_share_alone() -> None:
    """Half of 22 pairs in chunks of 8, 8 and 6 lie in two of them; the reference need not score the third."""
    plan = make_mixture(make_mixture(1).steps_per_epoch)
    needed = [chunk for chunk in plan.chunks_in_order_of_need(0) if chunk.source == 0]
    assert len(needed) == 2
    assert {take.chunk for take in plan.takes(1) if take.chunk.source == 0} >= set(plan.chunks[:3]) - set(needed)


def test_a_mixture_begins_anywhere_and_its_repeats_have_orders_of_their_own() -> None:
    plan = make_mixture(33)
    whole = batches(plan)
    for position in (0, 1, 10, 11, 12, 32):
        assert batches(plan, position) == whole[position:]
    once, again = (take for take in plan.takes(0) if take.chunk.source == 1)
    ids = ids_of(once.chunk)
    assert plan.pair_order(once, 0, ids) != plan.pair_order(again, 0, ids)
    assert sorted(plan.pair_order(once, 0, ids)) == sorted(plan.pair_order(again, 0, ids)) == list(range(10))


def test_a_mixture_of_ones_takes_what_no_mixture_takes() -> None:
    plain = make_plan([8, 8, 6], 4, 6)
    ones = Plan(0, plain.chunks, 4, 6, (1.0,))
    assert {(take.chunk, take.start, take.stop) for take in ones.takes(5)} == {
        (c, 0, c.num_pairs) for c in plain.chunks
    }
    assert ones.takes(5) == plain.takes(5)


def test_the_order_of_a_mixtures_names_does_not_matter() -> None:
    assert source_weights({"b": 2.0, "a": 0.5}) == source_weights({"a": 0.5, "b": 2.0}) == (0.5, 2.0)
    assert source_weights(["b", "a"]) == ()


def test_part_of_a_chunk_is_the_same_part_in_all_epochs() -> None:
    """The chunk's own order by keyed digests, written out anew; then the epoch's."""
    plan = make_mixture(1)
    chunk = plan.chunks[0]
    ids = ids_of(chunk)
    own = sorted(range(8), key=lambda i: hashlib.blake2b(ids[i], digest_size=16, key=b"3").digest())
    for epoch in (0, 7):
        key = f"3:{epoch}".encode()
        expected = sorted(own[2:5], key=lambda i: hashlib.blake2b(ids[i], digest_size=16, key=key).digest())
        assert plan.pair_order(Take(chunk, 2, 5), epoch, ids) == expected


def test_batch_digest_depends_on_order() -> None:
    a, b = b"a" * 16, b"b" * 16
    assert batch_digest([a, b]) == hashlib.sha256(a + b).hexdigest()[:32]
    assert batch_digest([a, b]) != batch_digest([b, a])
