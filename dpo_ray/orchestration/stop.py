"""A run that is asked to stop, by Ctrl-C, `ray job stop`, Slurm, Kubernetes, a sweep: it writes a checkpoint first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from dpo_ray.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Takes signals during a `with` block: the first one asks, a second one does what it would have done before.

    Only in the main thread, where Python lets signals be handled; elsewhere no signal asks.
    """

    def __init__(self, why: Callable[[dict[str, Any]], str | None] = lambda line: None) -> None:
        """Takes nothing yet.

        Args:
            why: Called with each line of metrics that arrives; returns why the run shall stop there, or None.
        """
        self._why = why
        self._signal: signal.Signals | None = None
        self._reason: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> str | None:
        """What asked the run to stop, or None."""
        return self._reason if self._signal is None else self._signal.name

    def ask(self, reason: str) -> None:
        """Asks without a signal."""
        self._reason = self._reason or reason

    def hear(self, line: dict[str, Any]) -> None:
        """A line of metrics has arrived, or a tracker's wish (see `record.Recorder`)."""
        if reason := self._why(line) or line.get("stop"):
            self.ask(reason)

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._take) for each in SIGNALS}
        return self

    def __exit__(self, *details: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal = signal.Signals(number)
            return
        self.__exit__()
        signal.raise_signal(number)

    def check(self, run_uri: str, step: int, trained: bool = False) -> None:
        """Ends a run that was asked to stop, when none of its workers is left.

        Args:
            run_uri: The run directory.
            step: Of its newest checkpoint.
            trained: Whether there is nothing left to train: then a reason is none any more, a signal is.

        Raises:
            StoppedError: It was.
        """
        if self._signal is not None:
            raise StoppedError(
                f"{run_uri} was stopped by {self._signal.name}; its newest checkpoint is of step {step}, and the same "
                "command goes on from there",
                self._signal,
            )
        if self._reason is not None and not trained:
            raise StoppedError(f"{run_uri} was stopped: {self._reason}; its newest checkpoint is of step {step}")
