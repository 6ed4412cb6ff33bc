"""What `dpo-ray plan` computes against what a process takes while it really trains."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_ranks
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_ray.config import Config, parse_config
from dpo_ray.model import malloc
from dpo_ray.model.footprint import policy_footprint
from dpo_ray.model.linear import widens
from dpo_ray.model.shard import sharded_policy
from dpo_ray.pairs import pack
from dpo_ray.training.optimizer import build_optimizer
from dpo_ray.training.sizing import Hardware, Sizing
from dpo_ray.training.step import objective_of, train_step
from dpo_ray.types import ScoredPair, TokenizedPair

CPU = torch.device("cpu")
PAIR = [160, 180, 172]
# 20 million weights with a small vocabulary; 64 million, the output layer not tied; SmolLM2's shape, 135 million.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-20m": (
        "llama",
        {
            **{"hidden_size": 384, "num_hidden_layers": 10, "num_attention_heads": 6, "num_key_value_heads": 2},
            **{"intermediate_size": 1280, "vocab_size": 1000, "tie_word_embeddings": True},
        },
    ),
    "qwen3-64m": (
        "qwen3",
        {
            **{"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4},
            **{"head_dim": 64, "intermediate_size": 2048, "vocab_size": 32_000, "tie_word_embeddings": False},
        },
    ),
    "smollm2-135m": (
        "llama",
        {
            **{"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
            **{"intermediate_size": 1536, "vocab_size": 49_152, "tie_word_embeddings": True},
        },
    ),
}
# Model, workers, options, pairs of a step, tokens of a microbatch: with other worst moments.
CASES = [
    ("llama-20m", 1, {"model": {"compute_dtype": "float32"}}, 4, 2048),
    ("llama-20m", 1, {"model": {"gradient_checkpointing": True}}, 6, 1536),
    ("qwen3-64m", 2, {}, 4, 512),
    ("smollm2-135m", 1, {}, 2, 2048),
]


def scored_pairs(num: int) -> list[ScoredPair]:
    parts = [torch.arange(length, dtype=torch.int32).numpy() for length in PAIR]
    return [
        ScoredPair(TokenizedPair(index.to_bytes(16, "big"), parts[0], tuple(parts[1:])), torch.zeros(2).numpy())
        for index in range(num)
    ]


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def train(config: Config, rank: int, world: int) -> None:
    """Two steps, the first of them of little."""
    policy = sharded_policy(config.model, CPU)
    # Memory that tensors leave behind goes back at once, as tensors on a GPU find room where others were.
    for option, value in ((malloc._M_MMAP_MAX, 65536), (malloc._M_TRIM_THRESHOLD, 128 << 10)):
        malloc._set(option, value)
    malloc.return_freed_memory()
    optimizer, objective = build_optimizer(policy, config.optimizer), objective_of(config.objective)
    each = world == 1 and config.model.weights_dtype == "float32"
    for step, pairs in enumerate((world, config.train.global_batch_pairs), start=1):
        Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
        row = pack.table_of(pack.rank_batches(scored_pairs(pairs), step, 0, world, pack.Costs())).to_pylist()[rank]
        batch = pack.global_batch(row, config.train.tokens_per_microbatch, pack.Costs())
        train_step(policy, optimizer, batch, objective, 1.0, reduce_each=each)


def measured(rank: int, world: int, tiny: Config, config: Config, found: str) -> None:
    train(tiny, rank, world)  # What PyTorch loads at its first step is not the model's.
    before = resident("VmRSS")
    train(config, rank, world)
    if rank == 0:
        Path(found).write_text(json.dumps(resident("VmHWM") - before))


def a_run(path: Path, folder: Path, pairs: int, tokens: int, **sections: Any) -> Config:
    return parse_config(
        {
            "name": "run",
            "storage_path": str(folder),
            **sections,
            "model": {"path": str(path), **sections.get("model", {})},
            "data": {"train": ["pairs.jsonl"]},
            "train": {"global_batch_pairs": pairs, "tokens_per_microbatch": tokens},
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world", "options", "pairs", "tokens"), CASES)
def test_memory_is_what_was_computed(
    tmp_path: Path, tiny_model: Path, name: str, world: int, options: dict[str, Any], pairs: int, tokens: int
) -> None:
    """The peak of a step in the memory that the process really has, besides what it had before the model."""
    kind, sizes = MODELS[name]
    settings = AutoConfig.for_model(kind, **sizes, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).save_pretrained(tmp_path / name)
    config, tiny = (a_run(path, tmp_path, pairs, tokens, **options) for path in (tmp_path / name, tiny_model))
    if config.model.compute_dtype == "bfloat16" and widens(torch.bfloat16, CPU):
        pytest.skip("needs a CPU with instructions for bfloat16: elsewhere products go through float32")
    run_ranks(measured, world, tmp_path, tiny, config, str(tmp_path / "found"))
    found = json.loads((tmp_path / "found").read_text())
    sizing = Sizing(config, policy_footprint(config, PAIR), None, (sum(PAIR), sum(PAIR[1:])), Hardware())
    moments = sizing.moments(world, sizing.load(world))
    print({moment: (sum(parts.values()), parts) for moment, parts in moments.items()})
    print(f"measured {found / 2**20:.0f} MiB, computed {sizing.peak_bytes(world, sizing.load(world)) / 2**20:.0f} MiB")
    assert sizing.peak_bytes(world, sizing.load(world)) == pytest.approx(found, rel=0.15)
