"""Typed errors: one message each, for the person who must act on it; they survive pickling between actors."""

import contextlib
import traceback
from types import TracebackType

from dpo_ray.redaction import without_secrets


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that follow, and without secrets."""
    return without_secrets((str(error) or type(error).__name__).splitlines()[0])


class DpoRayError(Exception):
    """Base of all errors raised on purpose. No message of theirs has a secret in it."""

    def __init__(self, *about: object) -> None:
        """Takes the message, and what else a kind of error carries."""
        super().__init__(*(without_secrets(each) if isinstance(each, str) else each for each in about))


class FinalError(DpoRayError):
    """What would fail again: the run ends with this message instead of starting the workers anew."""


class UserError(FinalError):
    """The user's mistake: the command line prints the message without a traceback and exits with code 2."""


class ConfigError(UserError):
    """A configuration that cannot work. The message names the key, its value and the way to mend it."""


class DataError(UserError):
    """Preference data that cannot be used. The message names the file and, where there is one, the row."""


class StorageError(UserError):
    """A URI that cannot be read or written."""


class ComparisonError(UserError):
    """Comparisons of models from which no ranking follows. The message names the models."""


class JudgeError(FinalError):
    """The judge of an evaluation does not answer, or may not be asked any more; what it has said is kept."""


class RunHeldError(UserError):
    """Another driver is training this run."""


class LeaseLostError(FinalError):
    """Another driver has taken this run over; going on would be two drivers writing one run."""


class RowError(DpoRayError):
    """One row cannot become a pair; the message is the reason written to the rejects.

    There may be one for every third row, most of them only counted: secrets are looked for where one is read.
    """

    def __init__(self, *about: object) -> None:
        """Takes the reason."""
        Exception.__init__(self, *about)

    def __str__(self) -> str:
        return without_secrets(super().__str__())


class TiedError(RowError):
    """A row ranks no answer above another."""


class ReferenceMismatchError(FinalError):
    """Stored reference scores do not belong to the pairs they were asked for."""


class ScoresLostError(DpoRayError):
    """Scores were damaged after they had been looked at; the next attempt has them made again."""


class ReferenceFillError(FinalError):
    """The reference filler stopped before all chunks were scored."""


class EvaluationError(FinalError):
    """Checkpoints that are evaluated beside training cannot be."""


class ActorsLostError(FinalError):
    """Actors that sample, judge or answer died too often; what they have done is kept."""


class FencedError(DpoRayError):
    """Another attempt of the run has begun: this one may not write any more."""


class RecoveryError(FinalError):
    """More failures in a row than the configuration allows."""


class StoppedError(FinalError):
    """The run was asked to stop, and has.

    Attributes:
        signal: The number of the signal that asked; 0 where none did.
    """

    def __init__(self, message: str, signal: int = 0) -> None:
        """Takes the message and the signal's number."""
        super().__init__(message, signal)
        self.signal = int(signal)

    def __str__(self) -> str:
        return str(self.args[0])


class StopTraining(DpoRayError):  # noqa: N818 -- It is no error.
    """A tracker raises it to have the run write a checkpoint and stop; the message says why."""


class TrackerError(UserError):
    """A tracker of the user's own has failed. The message names it."""


class VersionError(UserError):
    """Files that another version of this package has written."""


class OutOfMemoryError(DpoRayError):
    """A device's memory was too small; the next attempt has a smaller budget."""


class CheckpointError(DpoRayError):
    """A checkpoint is incomplete or damaged."""


class FirstStepError(UserError):
    """At the first step the policy does not score the answers as the reference did."""


class NonFiniteLossError(UserError):
    """The loss is not finite; the message names the pairs of the global batch."""


class ErrorsWithoutSecrets(contextlib.ContextDecorator):
    """Redacts secrets from errors raised inside a `with` block or a function, and from their causes.

    Ray writes all of them down.
    """

    def __enter__(self) -> None:
        """Nothing yet."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises the error, or one like it, without what led to it where that has a secret."""
        if not isinstance(error, Exception):
            return
        text = "".join(traceback.format_exception(error))
        if without_secrets(text) == text:
            return
        said = str(error)
        if without_secrets(said) == said:
            raise error from None
        if known := _known(error):
            raise known from None
        raise RuntimeError(without_secrets(text)) from None


def _known(error: BaseException | None) -> DpoRayError | None:
    """The first error of ours among an error and what led to it: it says what to do."""
    while error is not None:
        if isinstance(error, DpoRayError):
            return error
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None
