"""The stream: the feed's rows in order, and a coordinator whose memory does not depend on how many there were."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from helpers import chunk_table

from dpo_ray.orchestration import stream as stream_module
from dpo_ray.orchestration.forget import ForgetBlocks
from dpo_ray.orchestration.stream import close_streams, stream
from dpo_ray.pairs import pack, store
from dpo_ray.pairs.plan import plan_of
from dpo_ray.training.feed import Feed
from dpo_ray.types import TokenizedPair

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def make_feed(folder: Path, chunk_pairs: list[int], num_tokens: int, batch: int, epochs: int) -> Feed:
    """Chunks of random pairs with parts of `num_tokens` tokens, and their plan."""
    rng = np.random.default_rng(0)
    chunks = []
    for index, num in enumerate(chunk_pairs):
        parts = rng.integers(0, 2**31, (num, 3, num_tokens), dtype=np.int32)
        pairs = [TokenizedPair(rng.bytes(16), prompt, tuple(answers)) for prompt, *answers in parts]
        chunks.append(store.write_chunk(str(folder), store.chunk_name("train", index), chunk_table(pairs)))
    plan = plan_of(chunks, seed=0, global_batch_pairs=batch, epochs=epochs, max_steps=None)
    return Feed(plan, str(folder), None, lambda: None, pack.Costs())


@pytest.mark.parametrize(("position", "ranks", "most_loads"), [(0, 1, 256), (7, 2, 4), (12, 3, 1)])
def test_rows_are_the_feeds(
    position: int, ranks: int, most_loads: int, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many windows a task loads: 9 steps an epoch, batches that begin in one chunk and end in another."""
    monkeypatch.setattr(stream_module, "MOST_LOADS", most_loads)
    feed = make_feed(tmp_path, [20, 30, 15, 25], num_tokens=4, batch=10, epochs=2)
    expected = [rows for window in feed.plan.windows(position) for rows in feed.rows(window, ranks)]
    assert [rows[0]["step"] for rows in expected] == list(range(position + 1, 19))

    @ray.remote(num_cpus=0)
    def read(part: ray.data.DataIterator) -> bytes:
        return pickle.dumps([table for table in part.iter_batches(batch_size=1, batch_format="pyarrow")])

    streams = stream(feed, position, ranks).streaming_split(ranks, equal=True)
    for rank, tables in enumerate(map(pickle.loads, ray.get([read.remote(part) for part in streams]))):
        assert [table.to_pylist() for table in tables] == [pack.table_of([rows[rank]]).to_pylist() for rows in expected]
    close_streams(streams)


def test_the_coordinator_does_not_grow(tmp_path: Path, local_ray: None) -> None:
    """Rows of 60 KB, which Ray would hand over within its messages: 12 MB between first and last measurement."""
    feed = make_feed(tmp_path, [1000], num_tokens=250, batch=20, epochs=6)
    (part,) = streams = stream(feed, 0, 1).streaming_split(1, equal=True)

    def private_bytes(_: Any) -> int:
        with open("/proc/self/smaps_rollup") as rollup:
            return sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss_Anon:"))

    sizes = []
    for number, table in enumerate(part.iter_batches(batch_size=1, batch_format="pyarrow")):
        assert 2**15 < table.nbytes < 100 * 2**10
        if number % 100 == 50:
            sizes.append(ray.get(part._coord_actor.__ray_call__.remote(private_bytes)))
    close_streams(streams)
    assert len(sizes) == 3
    assert sizes[-1] - sizes[0] < 4 * 2**20, sizes


def test_ray_keeps_statistics_of_blocks_and_forgets_them(local_ray: None) -> None:
    kept = []

    class Spy(ForgetBlocks):
        def on_execution_step(self, executor: Any) -> None:
            before = [len(found) for op in executor._topology if (found := getattr(op, "_output_blocks_stats", []))]
            super().on_execution_step(executor)
            after = [len(getattr(op, "_output_blocks_stats", [])) for op in executor._topology]
            kept.append((sum(before), sum(after)))

    numbers = ray.data.range(40, override_num_blocks=40).map_batches(lambda batch: batch)
    numbers.context.custom_execution_callback_classes.append(Spy)
    assert len(list(numbers.iter_rows())) == 40
    assert sum(before for before, _ in kept) >= 40
    assert not any(after for _, after in kept)
