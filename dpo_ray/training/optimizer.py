"""Optimizers and the learning rate, both without state of their own beyond the optimizer's tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from optimi import AdamW as KahanAdamW
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer, RMSprop
from transformers import get_scheduler

from dpo_ray.config import OptimizerConfig
from dpo_ray.errors import ConfigError
from dpo_ray.extensions import check_installed
from dpo_ray.model.shard import embeddings_of

# Of bitsandbytes' kernel: so many moments have a scale in common.
BLOCK = 256


def check_optimizer(config: OptimizerConfig) -> None:
    """Refuses an optimizer whose package is not installed.

    Raises:
        ConfigError: It is missing; the message says how to install it.
    """
    if config.name == "adamw_8bit":
        check_installed("bitsandbytes", "bitsandbytes", f"optimizer.name is {config.name}")


class AdamW8bit(AdamW):
    """AdamW with the moments of most weights in 8 bits (arXiv:2110.02861), by bitsandbytes' kernel on a rank's rows.

    Moments with a scale in common lie within a row, and a row on one rank: neither an update nor a checkpoint depends
    on how many ranks there are.
    """

    def __init__(self, groups: list[dict[str, Any]], compact: set[nn.Parameter], config: OptimizerConfig) -> None:
        """Begins.

        Args:
            groups: As torch has them.
            compact: Those with moments in 8 bits, see `compact_weights`.
            config: AdamW's hyperparameters.
        """
        super().__init__(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
        from bitsandbytes.functional import create_dynamic_map

        self._compact, device = compact, next(iter(compact)).device
        # What the 256 codes stand for, in the first moment and in the second, which has no sign.
        self._codes = [create_dynamic_map(signed=signed).to(device) for signed in (True, False)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self._compact and parameter.grad is not None:
                    self._update(parameter, self.state[parameter], group)
                    parameter.grad = None  # What still has one is AdamW's.
        return super().step(closure)

    def _update(self, parameter: nn.Parameter, state: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.zeros(())
            scales = parameter.flatten(1)[:, : parameter.numel() // parameter.shape[0] // BLOCK]
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, dtype=torch.uint8)
                state[f"{moment}_scale"] = torch.zeros_like(scales)
        state["step"] += 1
        if not _local(parameter).numel():
            return
        assert parameter.grad is not None, "there is no gradient"
        unused = 0.0, 0.0  # A third beta, and alpha.
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            "adam",
            *(_local(tensor) for tensor in (parameter.grad, parameter, state["exp_avg"], state["exp_avg_sq"])),
            *(*group["betas"], *unused, group["eps"], int(state["step"]), group["lr"]),
            *self._codes,
            *(_local(state[name]).view(-1) for name in ("exp_avg_scale", "exp_avg_sq_scale")),
            group["weight_decay"],
            1.0,  # The gradient is clipped already.
        )


def compact_weights(model: nn.Module) -> set[nn.Parameter]:
    """The trained weights whose moments adamw_8bit holds in 8 bits: of rows in whole blocks, but for embeddings."""
    embeddings = embeddings_of(model)
    return {
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad and parameter not in embeddings and in_blocks(parameter.shape[0], parameter.numel())
    }


def in_blocks(rows: int, numel: int) -> bool:
    """Whether each row is whole blocks, so that none lies on two ranks."""
    return numel // rows % BLOCK == 0


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The configured optimizer over all parameters that are not frozen; weight decay on matrices only.

    Args:
        model: The sharded policy.
        config: Which, and its hyperparameters.

    Raises:
        ConfigError: It needs a package that is not installed, or would be no other than AdamW here.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    match config.name:
        case "adamw":
            return AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
        case "rmsprop":
            return RMSprop(groups, lr=config.learning_rate, eps=config.eps)
        case "adamw_kahan":
            # Kahan summation keeps in a second bfloat16 what rounding an update into the weight would lose.
            return KahanAdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, kahan_sum=True)
        case "adamw_8bit":
            check_optimizer(config)
            if compact := compact_weights(model):
                return AdamW8bit(groups, compact, config)
            raise ConfigError(
                f"optimizer.name is adamw_8bit, but no trained weight of {type(model).__name__} has rows of a multiple "
                f"of {BLOCK} numbers: it would be adamw; use that"
            )


def learning_rate_at(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer steps done, as transformers' schedules have it.

    The first update of a run with warm-up has learning rate 0, as in transformers' Trainer.
    """
    dummy = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    schedule = get_scheduler(config.schedule, dummy, config.warmup_steps, total_steps)
    factor = schedule.lr_lambdas[0]
    return lambda step: config.learning_rate * float(factor(step))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Of the next step, for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
