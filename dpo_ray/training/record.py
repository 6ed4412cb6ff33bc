"""What rank 0 writes down: metrics.jsonl, ledger.jsonl and what the trackers show.

When no worker is left, the driver writes down the evaluations that are still to come.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.pairs.plan import batch_digest
from dpo_ray.training import evaluations, manifest
from dpo_ray.training.attempts import read_attempts
from dpo_ray.training.trackers import Point, open_trackers
from dpo_ray.types import Recording, TrainState

FLUSH_INTERVAL_S = 10.0


class Lines:
    """A growing file of JSON lines. Object storage cannot append, so `flush` puts all lines as a whole.

    Each is written as text once, when it comes: a month of them takes seconds, which training would wait for.
    """

    def __init__(self, uri: str, keep_until_step: int) -> None:
        """Opens the file and drops the lines of steps after `keep_until_step`: they will be done again."""
        self.uri = uri
        kept = (line for line in storage.read_json_lines(uri) if line["step"] <= keep_until_step)
        self._text = bytearray(b"".join(map(storage.json_line, kept)))
        self._durable_bytes = -1
        self.flush()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(json.loads, bytes(self._text).splitlines())

    def append(self, value: dict[str, Any]) -> None:
        """Adds a line; it is durable after the next `flush`."""
        self._text += storage.json_line(value)

    def flush(self) -> None:
        """Makes durable all lines that are there when it begins."""
        text = bytes(self._text)
        if len(text) > self._durable_bytes:
            storage.write_bytes(self.uri, text)
            self._durable_bytes = len(text)


class Recorder:
    """Records steps and evaluations. A context manager: its exit makes all durable and ends the trackers.

    A thread of its own writes, now and then and for `flush`: training does not wait for the storage.
    """

    def __init__(self, config: Config, context: Recording) -> None:
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
        self._train, self._total_steps = config.train, context.total_steps
        # Of evaluations beside training: those that are recorded, and the best of them.
        self._evaluated, self._best = set[int](), TrainState()
        if self._train.eval_place == "actors":
            self._attempts = [each for each in read_attempts(run_uri) if each.attempt <= attempt.attempt]
            for line in self._metrics:
                self._note(line)
        self._trackers = open_trackers(config, position, self._publish)
        # What other threads have heard; trackers hear of it from the one that trains, with the next line.
        self._news = deque[dict[str, Any]]()
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
            self._tell_news()
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
        self._tell_news()
        self._metrics.append(line)
        for tracker in self._trackers:
            tracker.log([Point.of(line)])
        self._publish(line)

    def promise(self, state: TrainState) -> None:
        """Makes durable what a checkpoint of this state says that there is; marks the best evaluation in it.

        Raises:
            StorageError: It could not be written.
            FencedError: Another attempt has begun.
        """
        self.flush()
        if self._train.eval_place == "actors":
            best = self._best
            state.best_metric, state.best_step, state.best_value = best.best_metric, best.best_step, best.best_value

    def committed(self, line: dict[str, Any]) -> None:
        """A checkpoint is there. May be called from any thread.

        Args:
            line: Its step, as `checkpoint`.
        """
        self._news.append(line)
        self._publish(line)

    def needs(self, step: int) -> bool:
        """Whether the checkpoint of a step is still to be evaluated beside training, or was the best so far."""
        if self._train.eval_place != "actors":
            return False
        waits = evaluations.is_due(self._train, step, self._total_steps) and step not in self._evaluated
        return waits or step == self._best.best_step

    def flush(self) -> None:
        """Takes in what was evaluated beside training, and makes everything recorded so far durable.

        May be called from any thread.

        Raises:
            StorageError: It could not be written.
            FencedError: Another attempt has begun.
        """
        with self._writing:
            self._fence()
            if self._train.eval_place == "actors":
                self._take_in()
            self._metrics.flush()
            self._ledger.flush()
            for tracker in self._trackers:
                tracker.flush()

    def _take_in(self) -> None:
        for made in evaluations.there(self._run_uri):
            if made.step not in self._evaluated and evaluations.maker(self._attempts, made.step) == made.attempt:
                line = evaluations.read(self._run_uri, made)
                self._metrics.append(line)
                self._news.append(line)
                self._publish(line)
                self._note(line)

    def _tell_news(self) -> None:
        while self._news:
            line = self._news.popleft()
            step = line.get("checkpoint")
            for tracker in self._trackers:
                if step is None:
                    tracker.log([Point.of(line)])
                else:
                    name = manifest.checkpoint_name(step)
                    tracker.checkpoint(step, manifest.checkpoint_uri(self._run_uri, name))

    def _note(self, line: dict[str, Any]) -> None:
        if "eval_loss" not in line:
            return
        if self._train.keep_best:
            manifest.take_best(self._train.keep_best, line, self._best)
        # Last: what is evaluated and not the best is not needed any more.
        self._evaluated.add(line["step"])

    def _flush_now_and_then(self) -> None:
        took_s = 0.0
        # A file of hundreds of megabytes is not written all the time.
        while not self._done.wait(max(FLUSH_INTERVAL_S, 20 * took_s)):
            began = time.monotonic()
            try:
                self.flush()
            except Exception as error:
                self._error = error
                return
            took_s = time.monotonic() - began

    def _links(self) -> dict[str, str]:
        """Where what the run leaves is; its driver writes the report when all else is done."""
        names = {"export": "export", "report": "report.html"}
        return {"run": self._run_uri} | {name: storage.join(self._run_uri, file) for name, file in names.items()}
