"""Which chunks have scores when a step is asked for."""

import pytest

from dpo_ray.pairs.plan import Plan
from dpo_ray.pairs.store import Chunk
from dpo_ray.training.own_reference import Needs


@pytest.mark.parametrize(("sizes", "batch"), [([10, 7, 12], 4), ([3, 2, 1, 4], 8), ([100], 16), ([1] * 9, 2)])
@pytest.mark.parametrize("position", [0, 2])
def test_what_a_step_needs_is_named_before_it(sizes: list[int], batch: int, position: int) -> None:
    """And what the next one needs."""
    chunks = tuple(Chunk(f"train-{i:06d}.parquet", f"key{i}", "", size, size) for i, size in enumerate(sizes))
    plan = Plan(0, chunks, batch, 2 * -(-sum(sizes) // batch))
    # By the pairs themselves, in the epoch's order: which chunks a step's batch is made of.
    of_step: dict[int, set[str]] = {}
    for step in range(plan.total_steps):
        epoch, index = divmod(step, plan.steps_per_epoch)
        pairs = [take.chunk.key for take in plan.takes(epoch) for _ in range(take.num_pairs)]
        of_step[step + 1] = set(pairs[index * batch : (index + 1) * batch])
    needs, named = Needs(plan, position), set[str]()
    for step in range(position + 1, plan.total_steps + 1):
        named |= {chunk.key for chunk in needs.of(step)}
        for needed in range(step, min(step + 1, plan.total_steps) + 1):
            assert of_step[needed] <= named


def test_a_long_epoch_is_not_scored_at_once() -> None:
    """Chunks of 2 pairs, batches of 4: two chunks for each of 2 steps, and one more; then two for each step."""
    chunks = tuple(Chunk(f"train-{i:06d}.parquet", f"key{i}", "", 2, 2) for i in range(100))
    needs = Needs(Plan(0, chunks, 4, 50), 0)
    assert [len(needs.of(step)) for step in (1, 2, 3)] == [5, 2, 2]
