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
from dpo_ray.config import Config, OptimizerConfig
from dpo_ray.errors import ConfigError, OutOfMemoryError
from dpo_ray.model.shard import set_gradient_sync
from dpo_ray.training.optimizer import compact_weights
from dpo_ray.types import GlobalBatch, WorkerContext

log = logging.getLogger(__name__)

# On a CPU longer packs are no faster: its caches are small.
CPU_TOKENS = 2048
# Packs of these sizes are tried to see what a token takes.
TRIED_TOKENS = (768, 3072)
# Of the memory that the device has; the rest is for what comes in between, and for fragments.
USED_SHARE = 0.85
# Of the budget that did not fit.
SHRINK = 0.7
MOST_TOKENS, PADDED_TOKENS = 65_536, 4096
# Of the memory, what the unsummed gradient of the whole model may take.
GRADIENT_SHARE = 0.15
# What an optimizer keeps per trained number, at most: two moments in float32, and Kahan's compensation; or in 8 bits.
STATE_BYTES, COMPACT_STATE_BYTES = 10, 3


class Budget:
    """The tokens of a microbatch, the same on all ranks; the run's folder keeps what was found out."""

    def __init__(self, config: Config, context: WorkerContext) -> None:
        """Reads what is known.

        Collective: all ranks.
        """
        self._uri, self._context = storage.join(config.run_uri, "budget.json"), context
        configured = config.train.tokens_per_microbatch
        names: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(names, _device_name(context.device))
        # What a budget holds for.
        self._optimizer = config.optimizer
        self._valid_for = {
            "configured": configured,
            "world_size": dist.get_world_size(),
            "shard_over": context.group,
            "gradient_checkpointing": config.model.gradient_checkpointing,
            "cpu_offload": config.model.cpu_offload,
            "devices": sorted(set(names)),
        }
        # With one rank there is nothing to sum, and a second gradient of the whole model beside the first to save.
        self.reduce_each = dist.get_world_size() == 1 and config.model.weights_dtype == "float32"
        stored = [storage.read_json(self._uri) if context.rank == 0 and storage.exists(self._uri) else None]
        dist.broadcast_object_list(stored)
        known = stored[0] if stored[0] is not None and stored[0]["valid_for"] == self._valid_for else None
        self._measure = known is None and configured == "auto" and context.device.type == "cuda"
        self.tokens = known["tokens"] if known else CPU_TOKENS if configured == "auto" else configured

    def settle(self, model: nn.Module) -> int:
        """The budget, measured where it is not known.

        Also decides whether gradients are summed over ranks after each microbatch (`reduce_each`): where the gradient
        of the whole model would take much of the memory.

        Args:
            model: The policy, without gradients and optimizer state.

        Returns:
            Tokens of a microbatch.

        Raises:
            OutOfMemoryError: Not even the packs to measure with fit.

        Collective: all ranks.
        """
        if self._context.device.type == "cuda":
            # Until it is summed, a gradient is in float32.
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            gradient_bytes = 4 * sum(parameter.numel() for parameter in trained)
            large = torch.tensor(gradient_bytes > GRADIENT_SHARE * _memory_bytes(self._context.device))
            large = large.to(self._context.device, torch.int32)
            dist.all_reduce(large, op=dist.ReduceOp.MAX)
            self.reduce_each |= bool(large)
            # Where there are several copies of the weights, what waits to be summed over them stays in float32.
            rounds = trained[0].dtype == torch.bfloat16 and self._context.group == dist.get_world_size()
            if self.reduce_each and rounds and self._context.rank == 0:
                log.warning(
                    "gradients are summed over workers after each microbatch, to save memory, and added up in "
                    "bfloat16, the dtype of the weights; model.weights_dtype: float32 adds them up in float32"
                )
        if self._measure:
            self.tokens, device = TRIED_TOKENS[-1], self._context.device
            with self.watched():
                few, many = (_peak_bytes(model, tokens, device, self.reduce_each) for tokens in TRIED_TOKENS)
            config = cast(Any, model).config.get_text_config()
            least = 2 * config.num_hidden_layers * config.hidden_size
            affordable = affordable_tokens(
                few, many, least, _state_bytes(model, self._optimizer), _memory_bytes(device)
            )
            if not cast(Any, model).packed:
                # Padded rows with their prompts take several times the memory that their tokens say.
                affordable = min(affordable, PADDED_TOKENS)
            found = torch.tensor(affordable, device=device)
            dist.all_reduce(found, op=dist.ReduceOp.MIN)
            self.tokens = int(found)
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
                    f"step {batch.step}: out of memory in the update, or with a single pair of up to {longest} "
                    "tokens in a microbatch; set model.gradient_checkpointing: true, lower data.max_length, or raise "
                    "scaling.workers"
                ) from None
            log.warning("%s", error)
            before, self.tokens = self.tokens, int(self.tokens * SHRINK)
            self._context.fence()
            self._write("out of memory")
            raise OutOfMemoryError(
                f"out of memory with microbatches of {before} tokens; going on with {self.tokens}"
            ) from None

    def _write(self, reason: str) -> None:
        document = {"tokens": self.tokens, "reason": reason, "valid_for": self._valid_for}
        storage.write_json(self._uri, document)


def affordable_tokens(few_bytes: int, many_bytes: int, least_bytes: int, state_bytes: int, memory_bytes: int) -> int:
    """The budget that fills a device, from the peaks of the two packs that were tried.

    A pack's memory grows in proportion to its tokens; what does not grow is weights, gradients and, still to come,
    the optimizer's state.

    Args:
        few_bytes: Peak with the first of `TRIED_TOKENS`.
        many_bytes: Peak with the second.
        least_bytes: What a token takes at the very least: the two peaks may both be another moment's.
        state_bytes: What the optimizer will take.
        memory_bytes: The device's.

    Returns:
        A multiple of 256, at least the second of `TRIED_TOKENS`, which has been seen to fit.
    """
    few, many = TRIED_TOKENS
    per_token = max(least_bytes, (many_bytes - few_bytes) / (many - few))
    fixed = many_bytes - per_token * many + state_bytes
    affordable = int((USED_SHARE * memory_bytes - fixed) / per_token) // 256 * 256
    return min(max(affordable, many), MOST_TOKENS)


def _out_of_memory(error: RuntimeError) -> bool:
    signs = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def _peak_bytes(model: nn.Module, num_tokens: int, device: torch.device, reduce_each: bool) -> int:
    """Largest memory during two microbatches of a step, over pairs of 128 tokens a part.

    Until it is summed over ranks, each holds the gradient of the whole model.
    """
    lengths = [[128, 128, 128]] * (num_tokens // 384)
    tokens = torch.zeros(sum(map(sum, lengths)), dtype=torch.int64)
    torch.cuda.reset_peak_memory_stats(device)
    for last in (False, True):
        set_gradient_sync(model, reduce_each or last, last)
        per_token, _ = cast(Any, model).token_scores(tokens, lengths)
        per_token.logps.sum().backward()
    model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated(device)


def _state_bytes(model: nn.Module, config: OptimizerConfig) -> int:
    """What the optimizer will take of the device's memory."""
    compact = compact_weights(model) if config.name == "adamw_8bit" else set()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.is_cuda]
    return sum(
        cast(Any, parameter).to_local().numel() * (COMPACT_STATE_BYTES if parameter in compact else STATE_BYTES)
        for parameter in trained
    )


def _memory_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
