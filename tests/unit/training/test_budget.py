"""The budget of a microbatch: arithmetic from two measurements, and what running out of memory leads to."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import run_ranks, tiny_config

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.errors import ConfigError, OutOfMemoryError
from dpo_ray.training import budget as budgets
from dpo_ray.training.budget import Budget, affordable_tokens

MIB = 2**20


def test_affordable_tokens() -> None:
    """768 tokens take 1,000 MiB and 3,072 take 2,152: half a MiB each beside 616. With 256 MiB of optimizer state,
    0.85 of 8,000 MiB leave (6,800 - 616 - 256) / 0.5 = 11,856 tokens, or 46 times 256."""
    assert affordable_tokens(1000 * MIB, 2152 * MIB, 1, 256 * MIB, 8000 * MIB) == 46 * 256


def test_a_peak_of_another_moment_does_not_make_tokens_free() -> None:
    """Both peaks are the gradients': a token is taken for its least, 0.25 MiB: (6,800 - 1,000 + 768) / 0.25."""
    assert affordable_tokens(1000 * MIB, 1000 * MIB, MIB // 4, 0, 8000 * MIB) == (6800 - 1000 + 768) * 4 // 256 * 256


def test_what_has_been_seen_to_fit_is_never_undercut() -> None:
    assert affordable_tokens(1000 * MIB, 2152 * MIB, 1, 256 * MIB, 1000 * MIB) == budgets.TRIED_TOKENS[-1]


def batch(*pairs: int) -> Any:
    microbatches = [SimpleNamespace(lengths=[[1, 1, 1]] * num, tokens=torch.zeros(3 * num)) for num in pairs]
    return SimpleNamespace(step=7, microbatches=microbatches)


def one_rank(rank: int, world: int, config: Config) -> None:
    context: Any = SimpleNamespace(rank=rank, group=world, device=torch.device("cpu"), fence=lambda: None)
    assert Budget(config, context).reduce_each == (world == 1)


@pytest.mark.parametrize("world", [1, 2])
def test_one_rank_holds_no_second_gradient(world: int, tmp_path: Path) -> None:
    run_ranks(one_rank, world, tmp_path, tiny_config(str(tmp_path), "run", tmp_path, "pairs.jsonl"))


def shrinking(rank: int, world: int, config: Config) -> None:
    """Every rank finds what one of them has written; another setting starts from itself."""
    context: Any = SimpleNamespace(rank=rank, group=world, device=torch.device("cpu"), fence=lambda: None)
    first = Budget(config, context)
    assert first.settle(torch.nn.Linear(1, 1)) == 600
    torch.distributed.barrier()
    if rank == 1:
        smaller = pytest.raises(OutOfMemoryError, match="microbatches of 600 tokens; going on with 420")
        with smaller, first.watched(batch(2, 1)):
            raise torch.OutOfMemoryError
    torch.distributed.barrier()
    assert Budget(config, context).settle(torch.nn.Linear(1, 1)) == 420
    other = config.model_copy(update={"train": config.train.model_copy(update={"tokens_per_microbatch": "auto"})})
    assert Budget(other, context).settle(torch.nn.Linear(1, 1)) == budgets.CPU_TOKENS


def test_running_out_of_memory_shrinks_the_budget_of_all(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), "run", tmp_path, "pairs.jsonl")
    run_ranks(shrinking, 2, tmp_path, config)
    assert storage.read_json(f"{config.run_uri}/budget.json")["reason"] == "out of memory"


def alone(rank: int, world: int, config: Config) -> None:
    context: Any = SimpleNamespace(rank=0, group=1, device=torch.device("cpu"), fence=lambda: None)
    budget = Budget(config, context)
    mistake = pytest.raises(ConfigError, match="step 7: out of memory .* a single pair of up to 3 tokens")
    with mistake, budget.watched(batch(1, 0, 1)):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="another"), budget.watched(batch(2)):
        raise RuntimeError("another")


def test_what_is_too_large_for_one_pair_is_the_users_to_mend(tmp_path: Path) -> None:
    run_ranks(alone, 1, tmp_path, tiny_config(str(tmp_path), "run", tmp_path, "pairs.jsonl"))
