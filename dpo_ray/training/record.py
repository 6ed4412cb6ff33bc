"""What rank 0 writes down: metrics.jsonl, ledger.jsonl and what the trackers show."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.pairs.plan import batch_digest
from dpo_ray.training import manifest
from dpo_ray.training.trackers import Point, open_trackers
from dpo_ray.types import TrainState, WorkerContext

FLUSH_INTERVAL_S = 10.0


class Lines:
    """A growing file of JSON lines. Object storage cannot append, so `flush` puts all lines as a whole."""

    def __init__(self, uri: str, keep_until_step: int) -> None:
        """Opens the file and drops the lines of steps after `keep_until_step`: they will be done again."""
        self.uri = uri
        self._lines = [line for line in storage.read_json_lines(uri) if line["step"] <= keep_until_step]
        self._durable = -1
        self.flush()

    def append(self, value: dict[str, Any]) -> None:
        """Adds a line; it is durable after the next `flush`."""
        self._lines.append(value)

    def flush(self) -> None:
        """Makes durable all lines that are there when it begins."""
        lines = self._lines[:]
        if len(lines) > self._durable:
            storage.write_json_lines(self.uri, lines)
            self._durable = len(lines)


class Recorder:
    """Records steps and evaluations. A context manager: its exit makes all durable and ends the trackers.

    A thread of its own writes, now and then and for `flush`: training does not wait for the storage.
    """

    def __init__(self, config: Config, context: WorkerContext) -> None:
        """Drops what was recorded after the attempt's position: those steps are done again.

        Args:
            config: The run.
            context: Its attempt, `fence` and `publish`: called with each line, with `{"warning": text}` when a tracker
                is in trouble, and with `{"stop": text}` when one wants the run to write a checkpoint and stop.

        Raises:
            ConfigError: The package of a tracker is not installed.
            TrackerError: One of the user's own cannot be made.
            FencedError: Another attempt has begun.
        """
        run_uri, attempt, position = config.run_uri, context.attempt, context.attempt.position
        self._run_uri, self._fence, self._publish = run_uri, context.fence, context.publish
        self._fence()
        self._metrics = Lines(storage.join(run_uri, "metrics.jsonl"), position)
        self._ledger = Lines(storage.join(run_uri, "ledger.jsonl"), position)
        self._about = {"attempt": attempt.attempt, "world_size": attempt.world_size, "shard_over": context.group}
        self._full = config.train.ledger == "full"
        self._trackers = open_trackers(config, position, self._publish)
        self._committed = deque[int]()
        self._writing = threading.Lock()
        self._done = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._flush_now_and_then, name="recorder", daemon=True)

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if error is None:
            self.flush()
            self._tell_committed()
        links = {"run": self._run_uri} if error is not None else self._links()
        for tracker in self._trackers:
            tracker.finish(links, failed=error is not None)

    def step(self, line: dict[str, Any], pair_ids: Sequence[bytes]) -> None:
        """Records one optimizer step: its metrics, and which pairs it saw.

        Raises:
            StorageError: What was recorded before could not be written.
            FencedError: Another attempt has begun.
            TrackerError: A tracker of the user's own has failed.
        """
        if self._error is not None:
            raise self._error
        entry = {"step": line["step"], "digest": batch_digest(pair_ids), "num_pairs": len(pair_ids), **self._about}
        if self._full:
            entry["pair_ids"] = [pair_id.hex() for pair_id in pair_ids]
        self._ledger.append(entry)
        self.line(line)

    def line(self, line: dict[str, Any]) -> None:
        """Records a line of metrics."""
        self._metrics.append(line)
        self._tell_committed()
        for tracker in self._trackers:
            tracker.log([Point.of(line)])
        self._publish(line)

    def promise(self, state: TrainState) -> None:
        """A checkpoint is about to be committed: the lines up to its step become durable; see `flush`."""
        self.flush()

    def committed(self, line: dict[str, Any]) -> None:
        """A checkpoint is there; trackers hear of it with the next line. May be called from any thread.

        Args:
            line: Its step, as `checkpoint`.
        """
        self._committed.append(line["checkpoint"])
        self._publish(line)

    def _tell_committed(self) -> None:
        while self._committed:
            step = self._committed.popleft()
            uri = manifest.checkpoint_uri(self._run_uri, manifest.checkpoint_name(step))
            for tracker in self._trackers:
                tracker.checkpoint(step, uri)

    def flush(self) -> None:
        """Makes everything recorded so far durable; may be called from any thread.

        Raises:
            StorageError: It could not be written.
            FencedError: Another attempt has begun.
        """
        with self._writing:
            self._fence()
            self._metrics.flush()
            self._ledger.flush()
            for tracker in self._trackers:
                tracker.flush()

    def _flush_now_and_then(self) -> None:
        while not self._done.wait(FLUSH_INTERVAL_S):
            try:
                self.flush()
            except Exception as error:
                self._error = error
                return

    def _links(self) -> dict[str, str]:
        """Where what the run leaves is; its driver writes the report when all else is done."""
        names = {"export": "export", "report": "report.html"}
        return {"run": self._run_uri} | {name: storage.join(self._run_uri, file) for name, file in names.items()}
