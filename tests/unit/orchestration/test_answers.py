"""Which held-out prompts are asked."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dpo_ray.config import Config, parse_config
from dpo_ray.errors import ConfigError
from dpo_ray.orchestration import answers_job
from dpo_ray.orchestration.answers_job import Model, Prompt, _check_templates, held_out_prompts
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.pairs.store import Chunk, PairStore, chunk_name


def test_every_held_out_set_is_asked_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn, until one has no more; the prompt that both have once."""

    def prompts(
        config: Config, pairs: PairStore, chunks: Sequence[Chunk], originals: None
    ) -> Iterator[tuple[bytes, Prompt]]:
        for chunk in chunks:
            for number in range(chunk.num_pairs):
                name = "same" if number == 0 else f"{chunk.source}-{number}"
                yield name.encode(), Prompt(name, [])

    monkeypatch.setattr(answers_job, "_prompts", prompts)
    chunks = tuple(Chunk(chunk_name(f"eval.{source}", 0), "", "", pairs, 0) for source, pairs in ((0, 9), (1, 3)))
    raw = {
        "name": "a",
        "storage_path": str(tmp_path),
        "model": {"path": "m"},
        "data": {"train": ["a.jsonl"], "chat_template": "none"},
    }
    config = parse_config({**raw, "evaluation": {"prompts": 7}})
    found = held_out_prompts(config, PairStore("", (), chunks, {}), Watcher())
    assert [each.pair_id for each in found] == ["same", "1-1", "0-1", "1-2", "0-2", "0-3", "0-4"]


def test_a_model_that_cannot_be_asked(tmp_path: Path, tiny_model: Path) -> None:
    """Before anything is computed: its tokenizer has no template, or one that refuses."""
    raw = {"name": "a", "storage_path": str(tmp_path), "model": {"path": "m"}, "data": {"train": ["a.jsonl"]}}
    config, prompts = parse_config(raw), [Prompt("ab", [{"role": "system", "content": "Be brief."}])]
    good = Model("policy", str(tiny_model), str(tiny_model))
    _check_templates(config, prompts, [good])
    for name, template, said in (
        ("without", None, "chat_template is not set"),
        ("strict", "{{ raise_exception('no system turn') }}", "no system turn"),
    ):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
        other = Model(name, name, str(tmp_path / name))
        with pytest.raises(
            ConfigError, match=rf"{name}: its chat template cannot ask the prompt of pair ab .*{said}.*: leave"
        ):
            _check_templates(config, prompts, [good, other])
