"""How many tokens go into a microbatch: as given, or as many as the memory holds; less after running out of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.errors import ConfigError, OutOfMemoryError
from dpo_ray.types import GlobalBatch, WorkerContext

log = logging.getLogger(__name__)

# On a CPU longer packs are no faster: its caches are small.
CPU_TOKENS = 2048
# Packs of these sizes are tried to see what a token takes.
TRIED_TOKENS = (512, 2048)
# Of the memory that the device has; the rest is for what comes in between, and for fragments.
USED_SHARE = 0.85
# Of the budget that did not fit.
SHRINK = 0.7
MOST_TOKENS = 65_536
# What an optimizer keeps per trained number, at most: two moments in float32, and Kahan's compensation.
STATE_BYTES = 10


class Budget:
    """The tokens of a microbatch, the same on all ranks; the run's folder keeps what was found out."""

    def __init__(self, config: Config, context: WorkerContext) -> None:
        """Reads what is known.

        Collective: all ranks.
        """
        self._uri = storage.join(config.run_uri, "budget.json")
        self._configured, self._context = config.train.tokens_per_microbatch, context
        known = [storage.read_json(self._uri) if context.rank == 0 and storage.exists(self._uri) else None]
        dist.broadcast_object_list(known)
        found = known[0] if known[0] is not None and known[0]["configured"] == self._configured else None
        self.known = found is not None or self._configured != "auto"
        self.tokens = found["tokens"] if found else CPU_TOKENS if self._configured == "auto" else self._configured

    def settle(self, model: nn.Module) -> int:
        """The budget, measured where it is not known.

        Args:
            model: The policy, without gradients and optimizer state.

        Returns:
            Tokens of a microbatch.

        Raises:
            OutOfMemoryError: Not even the packs to measure with fit.

        Collective: all ranks.
        """
        if not self.known and self._context.device.type == "cuda":
            self.tokens = TRIED_TOKENS[-1]
            with self.watched():
                few, many = (_peak_bytes(model, tokens, self._context.device) for tokens in TRIED_TOKENS)
            affordable = affordable_tokens(few, many, _state_bytes(model), _memory_bytes(self._context.device))
            found = torch.tensor(affordable, device=self._context.device)
            dist.all_reduce(found, op=dist.ReduceOp.MIN)
            self.tokens, self.known = int(found), True
            if self._context.rank == 0:
                self._write("measured")
                log.warning("train.tokens_per_microbatch: auto is %d tokens here", self.tokens)
        return self.tokens

    @contextmanager
    def watched(self, batch: GlobalBatch | None = None) -> Iterator[None]:
        """Turns running out of memory into a smaller budget for the next attempt.

        Args:
            batch: What is computed inside.

        Raises:
            OutOfMemoryError: Where the memory was too small; the smaller budget is written.
            ConfigError: It was too small for a single pair.
        """
        try:
            yield
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            if batch is not None and all(len(each.lengths) <= 1 for each in batch.microbatches):
                longest = max(len(each.tokens) for each in batch.microbatches)
                raise ConfigError(
                    f"step {batch.step}: out of memory with a single pair of up to {longest} tokens in a microbatch; "
                    "set model.gradient_checkpointing: true, lower data.max_length, or raise scaling.workers"
                ) from None
            before, self.tokens = self.tokens, int(self.tokens * SHRINK)
            self._context.fence()
            self._write("out of memory")
            raise OutOfMemoryError(
                f"out of memory with microbatches of {before} tokens; going on with {self.tokens}"
            ) from None

    def _write(self, reason: str) -> None:
        document = {"configured": self._configured, "tokens": self.tokens, "reason": reason}
        storage.write_json(self._uri, document)


def affordable_tokens(few_bytes: int, many_bytes: int, state_bytes: int, memory_bytes: int) -> int:
    """The budget that fills a device, from the peaks of the two packs that were tried.

    A pack's memory grows in proportion to its tokens; what does not grow is weights, gradients and, still to come,
    the optimizer's state.

    Args:
        few_bytes: Peak with the first of `TRIED_TOKENS`.
        many_bytes: Peak with the second.
        state_bytes: What the optimizer will take.
        memory_bytes: The device's.

    Returns:
        A multiple of 256, at least the second of `TRIED_TOKENS`, which has been seen to fit.
    """
    few, many = TRIED_TOKENS
    per_token = max(1.0, (many_bytes - few_bytes) / (many - few))
    fixed = many_bytes - per_token * many + state_bytes
    affordable = int((USED_SHARE * memory_bytes - fixed) / per_token) // 256 * 256
    return min(max(affordable, many), MOST_TOKENS)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _peak_bytes(model: nn.Module, num_tokens: int, device: torch.device) -> int:
    """Largest memory during a forward and backward pass over random pairs of 128 tokens a part."""
    lengths = [[128, 128, 128]] * (num_tokens // 384) + [[num_tokens % 384 - 2, 1, 1]] * (num_tokens % 384 > 2)
    torch.cuda.reset_peak_memory_stats(device)
    per_token, _ = cast(Any, model).token_logps(torch.zeros(num_tokens, dtype=torch.int64), lengths)
    per_token.sum().backward()
    peak = torch.cuda.max_memory_allocated(device)
    model.zero_grad(set_to_none=True)
    return peak


def _state_bytes(model: nn.Module) -> int:
    parameters = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return sum(cast(Any, parameter).to_local().numel() * STATE_BYTES for parameter in parameters)


def _memory_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory
