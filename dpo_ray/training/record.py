"""What rank 0 writes down: metrics.jsonl, ledger.jsonl and TensorBoard events."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.pairs.plan import batch_digest
from dpo_ray.types import Attempt

FLUSH_INTERVAL_S = 10.0


class Recorder:
    """Records steps and evaluations; `flush` makes all of it durable."""

    def __init__(self, config: Config, attempt: Attempt, publish: Callable[[dict[str, Any]], None]) -> None:
        """Drops what was recorded after the attempt's position: those steps are done again.

        Args:
            config: The run.
            attempt: This start of the worker group.
            publish: Called with each line.
        """
        run_uri, position = config.run_uri, attempt.position
        self._metrics = storage.JsonLines(storage.join(run_uri, "metrics.jsonl"), position)
        self._ledger = storage.JsonLines(storage.join(run_uri, "ledger.jsonl"), position)
        self._about = {"attempt": attempt.attempt, "world_size": attempt.world_size}
        self._full = config.train.ledger == "full"
        self._publish = publish
        self._events_uri = storage.join(run_uri, "tensorboard")
        self._events = tempfile.TemporaryDirectory(prefix="dpo_ray-events-")
        self._writer = SummaryWriter(self._events.name, purge_step=position + 1)
        self._flushed = time.monotonic()

    def step(self, line: dict[str, Any], pair_ids: Sequence[bytes]) -> None:
        """Records one optimizer step: its metrics, and which pairs it saw."""
        entry = {"step": line["step"], "digest": batch_digest(pair_ids), "num_pairs": len(pair_ids), **self._about}
        if self._full:
            entry["pair_ids"] = [pair_id.hex() for pair_id in pair_ids]
        self._ledger.append(entry)
        self.line(line)
        if time.monotonic() - self._flushed > FLUSH_INTERVAL_S:
            self.flush()

    def line(self, line: dict[str, Any]) -> None:
        """Records a line of metrics."""
        self._metrics.append(line)
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(name, value, line["step"])
        self._publish(line)

    def flush(self) -> None:
        """Makes everything recorded so far durable."""
        self._metrics.flush()
        self._ledger.flush()
        self._writer.flush()
        for name in os.listdir(self._events.name):
            storage.upload(os.path.join(self._events.name, name), storage.join(self._events_uri, name))
        self._flushed = time.monotonic()
