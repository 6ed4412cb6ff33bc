"""Which held-out prompts are asked."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dpo_ray.config import Config, parse_config
from dpo_ray.orchestration import answers_job
from dpo_ray.orchestration.answers_job import Prompt, held_out_prompts
from dpo_ray.pairs.store import Chunk, PairStore, chunk_name


def test_every_held_out_set_is_asked_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn, until one has no more; the prompt that both have once."""

    def prompts(config: Config, pairs: PairStore, chunks: Sequence[Chunk]) -> Iterator[tuple[bytes, Prompt]]:
        for chunk in chunks:
            for number in range(chunk.num_pairs):
                name = "same" if number == 0 else f"{chunk.source}-{number}"
                yield name.encode(), Prompt(name, [])

    monkeypatch.setattr(answers_job, "_prompts", prompts)
    chunks = tuple(Chunk(chunk_name(f"eval.{source}", 0), "", "", pairs, 0) for source, pairs in ((0, 9), (1, 3)))
    raw = {"name": "a", "storage_path": str(tmp_path), "model": {"path": "m"}, "data": {"train": ["a.jsonl"]}}
    config = parse_config({**raw, "evaluation": {"prompts": 7}})
    found = held_out_prompts(config, PairStore("", (), chunks, {}))
    assert [each.pair_id for each in found] == ["same", "1-1", "0-1", "1-2", "0-2", "0-3", "0-4"]
