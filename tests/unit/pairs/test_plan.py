"""The plan: every pair once per epoch, in an order that depends on seed, epoch and position alone."""

import hashlib

import pytest

from dpo_ray.pairs.plan import Plan, Window, batch_digest, pair_order
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
        tuple(chunk.name for chunk in make_plan(sizes, 8, 1, seed).chunk_order(epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_pair_order_is_the_order_of_keyed_digests() -> None:
    """Written out here anew, so that no change of the plan can move pairs of a run that is under way."""
    ids = [bytes([i]) * 16 for i in range(50)]
    expected = sorted(range(50), key=lambda i: hashlib.blake2b(ids[i], digest_size=16, key=b"3:1").digest())
    assert pair_order(3, 1, ids) == expected
    assert pair_order(3, 2, ids) != expected


def test_windows_begin_in_one_chunk_each_and_read_few() -> None:
    """A window's batches begin in its first chunk, so that loading reads a chunk twice at most."""
    plan = make_plan([64] * 10, 20, 32)
    windows: list[Window] = list(plan.windows(0))
    assert len(windows) == 10
    assert max(len(window.segments) for window in windows) == 2


def test_chunks_in_order_of_need_begin_with_the_position() -> None:
    plan = make_plan([10] * 6, 5, 24)
    assert plan.chunks_in_order_of_need(0) == plan.chunk_order(0)
    # Position 8 is 40 pairs into the first epoch: its chunks 4 and 5, then the second epoch's first new ones.
    later = plan.chunks_in_order_of_need(8)
    assert later[:2] == plan.chunk_order(0)[4:]
    assert later[2:] == [chunk for chunk in plan.chunk_order(1) if chunk not in later[:2]]


def test_batch_digest_depends_on_order() -> None:
    a, b = b"a" * 16, b"b" * 16
    assert batch_digest([a, b]) == hashlib.sha256(a + b).hexdigest()[:32]
    assert batch_digest([a, b]) != batch_digest([b, a])
