"""What the driver tells while it works."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_ray.pairs.formats import Reading
from dpo_ray.pairs.plan import Plan
from dpo_ray.pairs.store import PairStore
from dpo_ray.redaction import without_secrets
from dpo_ray.types import Attempt


class _Handler(logging.Handler):
    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(without_secrets(record.getMessage()))


@contextlib.contextmanager
def warnings_to(tell: Callable[[str], None]) -> Iterator[None]:
    """Tells what this package logs as a warning during a `with` block, from whichever thread."""
    logger, handler = logging.getLogger("dpo_ray"), _Handler(tell)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@dataclass(frozen=True, slots=True)
class Example:
    """A pair as the model will see it.

    Attributes:
        prompt: The prompt's tokens, decoded.
        answers: Each answer's tokens, decoded, best first: all of them are trained.
        num_tokens: Of the prompt, then of each answer.
    """

    prompt: str
    answers: tuple[str, ...]
    num_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SourcePreview:
    """How the files of one entry of `data.train` or `data.eval` are read.

    Attributes:
        pattern: The entry.
        num_files: Files that it stands for.
        num_bytes: Their size.
        reading: Format and columns.
        examples: The first pairs.
        problem: Why the first row that cannot become a pair cannot, or None.
    """

    pattern: str
    num_files: int
    num_bytes: int
    reading: Reading
    examples: tuple[Example, ...]
    problem: str | None


class Watcher:
    """Told what happens; the command line shows it, and nothing depends on it."""

    def phase(self, text: str) -> None:
        """A phase of the work begins."""

    def warning(self, text: str) -> None:
        """Something that does not stop the work, and that its owner should know."""

    def source(self, preview: SourcePreview) -> None:
        """How a source of pairs is about to be read."""

    def progress(self, what: str, done: int, total: int) -> None:
        """How far a long phase is, in a unit of its own."""

    def rows(self, counts: Mapping[str, int]) -> None:
        """What became of the rows that have been read so far, by `store.COUNTS`."""

    def prepared(self, pairs: PairStore) -> None:
        """The pair store is there."""

    def planned(self, plan: Plan, position: int) -> None:
        """Training is about to begin at a position."""

    def began(self, attempt: Attempt) -> None:
        """A worker group is about to be started."""

    def ended(self, kind: str) -> None:
        """It has ended: "done", or what failed (see `group.End`)."""

    def line(self, line: dict[str, Any]) -> None:
        """A line of metrics arrived, a warning of a worker's, or the step of a checkpoint that was committed."""

    def scored(self, filled: Mapping[str, float | None]) -> None:
        """What the replicas of the reference have done so far (see `reference_filler.Filled`)."""
