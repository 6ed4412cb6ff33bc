"""Optimizers and the learning rate, both without state of their own beyond the optimizer's tensors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from optimi import AdamW as KahanAdamW
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer, RMSprop
from transformers import PreTrainedModel, get_scheduler

from dpo_ray.config import Dtype, OptimizerConfig
from dpo_ray.errors import ConfigError
from dpo_ray.extensions import check_installed
from dpo_ray.model.linear import widens
from dpo_ray.model.load import DTYPES
from dpo_ray.model.shard import embeddings_of, local_part

# Of bitsandbytes' kernel: so many moments have a scale in common.
BLOCK = 256
# Of Muon's quintic iteration, as its author chose them: steep at zero.
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 5
MOMENTUM = 0.95


def check_optimizer(config: OptimizerConfig) -> None:
    """Refuses an optimizer whose package is not installed.

    Raises:
        ConfigError: It is missing; the message says how to install it.
    """
    if config.name == "adamw_8bit":
        check_installed("bitsandbytes", "bitsandbytes", f"optimizer.name is {config.name}")


class _AdamWForOthers(AdamW, ABC):
    """AdamW, but for some weights, which a subclass updates."""

    def __init__(self, groups: list[dict[str, Any]], own: set[nn.Parameter], config: OptimizerConfig) -> None:
        """Begins.

        Args:
            groups: As torch has them.
            own: What the subclass updates.
            config: AdamW's hyperparameters.
        """
        super().__init__(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
        self._own = own

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update."""
        own = [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter in self._own and parameter.grad is not None
        ]
        self._update(own)
        for parameter, _ in own:
            parameter.grad = None  # What still has one is AdamW's.
        return super().step(closure)

    @abstractmethod
    def _update(self, own: list[tuple[nn.Parameter, dict[str, Any]]]) -> None:
        """Updates what is the subclass's own: each with its group."""


class AdamW8bit(_AdamWForOthers):
    """AdamW with the moments of most weights in 8 bits (arXiv:2110.02861), by bitsandbytes' kernel on a rank's rows.

    Moments with a scale in common lie within a row, and a row on one rank: neither an update nor a checkpoint depends
    on how many ranks there are.
    """

    def __init__(self, groups: list[dict[str, Any]], own: set[nn.Parameter], config: OptimizerConfig) -> None:
        """Begins, with the weights of `compact_weights`."""
        super().__init__(groups, own, config)
        from bitsandbytes.functional import create_dynamic_map

        device = next(iter(own)).device
        # What the 256 codes stand for, in the first moment and in the second, which has no sign.
        self._codes = [create_dynamic_map(signed=signed).to(device) for signed in (True, False)]

    def _update(self, own: list[tuple[nn.Parameter, dict[str, Any]]]) -> None:
        for parameter, group in own:
            state, grad = self.state[parameter], parameter.grad
            assert grad is not None, "there is no gradient"
            if not state:
                state["step"] = torch.zeros(())
                scales = parameter.flatten(1)[:, : parameter.numel() // parameter.shape[0] // BLOCK]
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment] = torch.zeros_like(parameter, dtype=torch.uint8)
                    state[f"{moment}_scale"] = torch.zeros_like(scales)
            state["step"] += 1
            if not local_part(parameter).numel():
                continue
            unused = 0.0, 0.0  # A third beta, and alpha.
            torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
                "adam",
                *(local_part(tensor) for tensor in (grad, parameter, state["exp_avg"], state["exp_avg_sq"])),
                *(*group["betas"], *unused, group["eps"], int(state["step"]), group["lr"]),
                *self._codes,
                *(local_part(state[name]).view(-1) for name in ("exp_avg_scale", "exp_avg_sq_scale")),
                group["weight_decay"],
                1.0,  # The gradient is clipped already.
            )


class Muon(_AdamWForOthers):
    """Muon for the matrices of the blocks, AdamW for all else (arXiv:2502.16982, section 2).

    Matrices are dealt to the ranks, each of which orthogonalizes its own as a whole: no product is computed twice, and
    none depends on the number of ranks. At the same learning rate an update is as large as AdamW's.
    """

    def __init__(
        self, groups: list[dict[str, Any]], own: set[nn.Parameter], config: OptimizerConfig, dtype: torch.dtype
    ) -> None:
        """Begins.

        Args:
            groups: As torch has them.
            own: Those of `block_matrices`.
            config: AdamW's hyperparameters.
            dtype: Of Muon's products.
        """
        super().__init__(groups, own, config)
        self._dtype = dtype

    def _update(self, own: list[tuple[nn.Parameter, dict[str, Any]]]) -> None:
        ranks = dist.get_world_size()
        # Those that are dealt together are of a size, so that no rank waits long.
        ordered = sorted(own, key=lambda each: each[0].numel())
        for start in range(0, len(ordered), ranks):
            dealt = ordered[start : start + ranks]
            wholes = [parameter for parameter, _ in dealt]
            updates = _dealt([self._ahead(parameter) for parameter in wholes], wholes)
            for (parameter, group), update in zip(dealt, updates, strict=True):
                local = local_part(parameter)
                local.mul_(1 - group["lr"] * group["weight_decay"])
                rate = 0.2 * math.sqrt(max(parameter.shape)) * group["lr"]
                local.add_(update.view_as(local), alpha=-rate)

    def _ahead(self, parameter: nn.Parameter) -> torch.Tensor:
        """This rank's part of the momentum, one step ahead as Nesterov has it."""
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None, "there is no gradient"
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(grad, 1 - MOMENTUM)
        return local_part(grad).lerp(local_part(state["momentum"]), MOMENTUM).to(self._dtype)


def _dealt(parts: list[torch.Tensor], matrices: list[nn.Parameter]) -> list[torch.Tensor]:
    """Orthogonalizes matrices, each on a rank of its own, which has its rows from those it shares a copy with.

    Args:
        parts: This rank's rows of each; at most as many as there are ranks.
        matrices: Of the same shapes.

    Returns:
        This rank's part of each result, flat.

    Collective: all ranks.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mesh = matrices[0].device_mesh if isinstance(matrices[0], DTensor) else None
    group = mesh.size(-1) if mesh is not None else 1  # Of ranks one after another, that share a copy.
    copy, place = divmod(rank, group)
    # Numbers of a matrix that each of a copy's ranks has.
    sizes = [[each.numel() for each in torch.empty(m.shape, device="meta").chunk(group)] for m in matrices]
    sizes = [[*each, *[0] * (group - len(each))] for each in sizes]
    back = [each[place] for each in sizes] + [0] * (ranks - len(matrices))
    given = [size if owner // group == copy else 0 for owner, size in enumerate(back)]
    own = sizes[rank] if rank < len(matrices) else [0] * group
    taken = [0] * copy * group + own + [0] * (ranks - (copy + 1) * group)
    whole = parts[0].new_empty(sum(taken))
    rows = [part.flatten() for part, size in zip(parts, given, strict=False) if size]
    dist.all_to_all_single(whole, torch.cat(rows) if rows else whole.new_empty(0), taken, given)
    if rank < len(matrices):
        whole = orthogonalized(whole.view(matrices[rank].shape)).flatten()
    result = parts[0].new_empty(sum(back))
    copies = ranks // group
    dist.all_to_all_single(result, whole.repeat(copies), back, own * copies)
    return list(result.split(back))[: len(matrices)]


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with its singular vectors, and singular values near 1, by five steps of Newton and Schulz.

    Args:
        matrix: Shape (rows, columns).

    Returns:
        Likewise, in the same dtype.
    """
    first, third, fifth = NEWTON_SCHULZ
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), wide, beta=first)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


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


def block_matrices(model: PreTrainedModel) -> set[nn.Parameter]:
    """The trained matrices that Muon updates: all but those of embeddings and of the output layer."""
    head = model.get_output_embeddings()
    others = embeddings_of(model) | ({head.weight} if head is not None else set())
    return {p for p in model.parameters() if p.requires_grad and p.ndim == 2 and p not in others}


def build_optimizer(model: PreTrainedModel, config: OptimizerConfig, compute_dtype: Dtype = "float32") -> Optimizer:
    """The configured optimizer over all parameters that are not frozen; weight decay on matrices only.

    Args:
        model: The sharded policy.
        config: Which, and its hyperparameters.
        compute_dtype: Of products that the optimizer makes.

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
            own = compact_weights(model)
            _refuse_none(own, model, config, f"has rows of a multiple of {BLOCK} numbers")
            return AdamW8bit(groups, own, config)
        case "muon":
            own = block_matrices(model)
            _refuse_none(own, model, config, "is a block's matrix")
            dtype = DTYPES[compute_dtype]
            return Muon(groups, own, config, torch.float32 if widens(dtype, trained[0].device) else dtype)


def _refuse_none(own: set[nn.Parameter], model: nn.Module, config: OptimizerConfig, which: str) -> None:
    if not own:
        raise ConfigError(
            f"optimizer.name is {config.name}, but no trained weight of {type(model).__name__} {which}: it would be "
            "adamw; use that"
        )


def learning_rate_at(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer steps done, as transformers' schedules have it.

    The first update of a run with warm-up has learning rate 0, as in transformers' Trainer.
    """
    dummy = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    share = config.warmup_steps if config.warmup_steps < 1 else 0.0
    warmup_steps = math.ceil(share * total_steps) if share else int(config.warmup_steps)
    schedule = get_scheduler(config.schedule, dummy, warmup_steps, total_steps)
    factor = schedule.lr_lambdas[0]
    return lambda step: config.learning_rate * float(factor(step))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Of the next step, for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate
