"""What rank 0 writes down: metrics.jsonl, ledger.jsonl and what the trackers show."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.errors import StorageError
from dpo_ray.pairs.plan import batch_digest
from dpo_ray.training.trackers import Point, open_trackers
from dpo_ray.types import Attempt

FLUSH_INTERVAL_S = 10.0


class Recorder:
    """Records steps and evaluations; `flush` makes all of it durable. A context manager: its exit ends the trackers."""

    def __init__(self, config: Config, attempt: Attempt, publish: Callable[[dict[str, Any]], None]) -> None:
        """Drops what was recorded after the attempt's position: those steps are done again.

        Args:
            config: The run.
            attempt: This start of the worker group.
            publish: Called with each line, and with `{"warning": text}` when a tracker is in trouble.

        Raises:
            ConfigError: The package of a tracker is not installed.
        """
        run_uri, position = config.run_uri, attempt.position
        self._run_uri = run_uri
        self._metrics = storage.JsonLines(storage.join(run_uri, "metrics.jsonl"), position)
        self._ledger = storage.JsonLines(storage.join(run_uri, "ledger.jsonl"), position)
        self._about = {"attempt": attempt.attempt, "world_size": attempt.world_size}
        self._full = config.train.ledger == "full"
        self._publish = publish
        self._trackers = open_trackers(config, position, publish)
        self._flushed = time.monotonic()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        links = {"run": self._run_uri} if error is not None else self._links()
        for tracker in self._trackers:
            tracker.finish(links, failed=error is not None)

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
        for tracker in self._trackers:
            tracker.log([Point.of(line)])
        self._publish(line)

    def flush(self) -> None:
        """Makes everything recorded so far durable."""
        self._metrics.flush()
        self._ledger.flush()
        for tracker in self._trackers:
            tracker.flush()
        self._flushed = time.monotonic()

    def _links(self) -> dict[str, str]:
        """Where what the run left is; the report only where there is one."""
        links = {"run": self._run_uri, "export": storage.join(self._run_uri, "export")}
        report = storage.join(self._run_uri, "report.html")
        with contextlib.suppress(StorageError):  # All is done by now: a link is nothing to fail for.
            return {**links, "report": report} if storage.exists(report) else links
        return links
