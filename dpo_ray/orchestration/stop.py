"""A run that is asked to stop, by Ctrl-C, `ray job stop`, Slurm or Kubernetes: it writes a checkpoint first."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from dpo_ray.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Takes signals during a `with` block: the first one asks, a second one does what it would have done before.

    Only in the main thread, where Python lets signals be handled; elsewhere nobody asks.

    Attributes:
        asked: The signal that asked, or None.
    """

    def __init__(self) -> None:
        """Takes nothing yet."""
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._take) for each in SIGNALS}
        return self

    def __exit__(self, *details: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked = signal.Signals(number)
            return
        self.__exit__()
        signal.raise_signal(number)

    def check(self, run_uri: str, step: int) -> None:
        """Ends a run that was asked to stop, when none of its workers is left.

        Args:
            run_uri: The run directory.
            step: Of its newest checkpoint.

        Raises:
            StoppedError: It was.
        """
        if self.asked is not None:
            raise StoppedError(
                f"{run_uri} was stopped by {self.asked.name}; its newest checkpoint is of step {step}, and the same "
                "command goes on from there",
                self.asked,
            )
