"""A reference that follows the policy (TR-DPO, arXiv 2404.09656): its weights, sharded as the policy's are."""

from __future__ import annotations

import torch
from torch import nn

from dpo_ray.config import ReferenceConfig
from dpo_ray.model.shard import local_part
from dpo_ray.training.checkpoint_tensors import parameters_of
from dpo_ray.types import TrainState


class MovingReference:
    """This rank's part of the reference, in the memory of the host.

    Attributes:
        tensors: By the names of the policy's parameters.
    """

    def __init__(self, model: nn.Module, config: ReferenceConfig, attempt: int) -> None:
        """Begins as the policy; keeps nothing where the reference stands still.

        Args:
            model: The sharded policy at its start.
            config: How often, and how far, the reference follows it.
            attempt: Who moves it.
        """
        self._model, self._every, self._alpha, self._attempt = model, config.sync_steps, config.mixup_alpha, attempt
        self.tensors: dict[str, torch.Tensor] = {}
        for name, parameter in parameters_of(model).items() if self._every else ():
            # In bfloat16 a small share of a small difference would round to nothing.
            self.tensors[name] = torch.empty_like(parameter, dtype=torch.float32, device="cpu", requires_grad=False)
            local_part(self.tensors[name]).copy_(local_part(parameter.detach()))

    @torch.no_grad()
    def follow(self, state: TrainState) -> bool:
        """After the steps that are due: reference = alpha * policy + (1 - alpha) * reference; the state then says so.

        Returns:
            Whether it has moved.
        """
        if self._every is None or state.step % self._every:
            return False
        for name, parameter in parameters_of(self._model).items():
            own = local_part(self.tensors[name])
            own.lerp_(local_part(parameter.detach()).to(own), self._alpha)
        state.reference_attempt = self._attempt
        return True
