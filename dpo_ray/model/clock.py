"""How long a rank itself computes: what shows the one that all others wait for.

Ranks wait for each other in every block, where weights are gathered and gradients are summed: a whole step takes all
of them as long as the slowest. One block's forward pass, from when its weights are there, waits for nobody.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn


class BlockClock:
    """Measures the forward passes of one block that are made to train. On a GPU nothing waits for it."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        """Begins.

        Args:
            block: A transformer block, sharded already: what FSDP does before and after its pass is not measured.
            device: Where it computes.
        """
        self._cuda = device.type == "cuda"
        self._began: Any = None
        self._passes = list[tuple[Any, Any]]()
        block.register_forward_pre_hook(self._begin)
        block.register_forward_hook(self._end, prepend=True)

    def read_s(self) -> float:
        """Seconds of all passes since the last reading; 0 where the device has not come to their end."""
        passes, self._passes = self._passes, []
        if not self._cuda:
            return float(sum(end - began for began, end in passes))
        if not passes or not passes[-1][1].query():
            return 0.0
        return float(sum(began.elapsed_time(end) for began, end in passes)) / 1000

    def _begin(self, *_: Any) -> None:
        self._began = self._now() if torch.is_grad_enabled() else None

    def _end(self, *_: Any) -> None:
        if self._began is not None:
            self._passes.append((self._began, self._now()))
            self._began = None

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
