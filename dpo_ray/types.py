"""The things that walk through the pipeline.

Shape legend: T tokens of a microbatch, A answers, P pairs, B pairs of a global batch, V vocabulary.
A pair is a prompt with two or more answers, best first: the first is chosen, the others are rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch  # Tasks that only move tokens must not wait seconds for its import.


class Message(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: What is said; None where there are tool calls instead.
        extra: Its other keys that chat templates know, such as tool_calls, as JSON has them.
    """

    role: str
    content: str | None
    extra: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The turn as chat templates take it."""
        return {"role": self.role, "content": self.content, **(self.extra or {})}


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt and its answers, best first, before any template or tokenizer.

    `layout` says how the row was written, and so how it reads without a chat template: `text` is a plain
    prompt and plain answers, `dialogue` an hh-rlhf transcript, `messages` a list of turns (which has no
    reading without a template), `raw` two texts with a common beginning (which have none with a template).
    `tools` describes the functions that the model may call, as JSON has them; None where there are none.
    `scores` are what a reward model or a judge gave the answers; empty where the row does not say.
    """

    prompt: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]
    layout: Literal["text", "dialogue", "messages", "raw"]
    tools: list[dict[str, Any]] | None = None
    scores: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A prompt and its answers, best first, that came as token ids: nothing is added to them.

    `scores` as in `PreferencePair`.
    """

    prompt: list[int]
    answers: tuple[list[int], ...]
    scores: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A prompt and its answers as token ids.

    Attributes:
        pair_id: 16 bytes, a digest of the token content: equal ids mean equal training data.
        prompt: Shape (prompt tokens,), int32.
        answers: Each of shape (answer tokens,), int32, never empty, best first.
        weight: What its loss counts.
        margin: By how much the chosen answer is to be better, in units of the reward.
    """

    pair_id: bytes
    prompt: np.ndarray
    answers: tuple[np.ndarray, ...]
    weight: float = 1.0
    margin: float = 0.0

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        """The prompt, once, and the answers, in the order in which they are laid out."""
        return (self.prompt, *self.answers)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all answers."""
        return sum(map(len, self.parts))


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """A tokenized pair with the reference's summed log-probability of each answer.

    Attributes:
        pair: The tokens.
        ref_logps: Shape (answers,), float32, nats; None where the objective needs no reference.
    """

    pair: TokenizedPair
    ref_logps: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Pairs laid out one after the other, each as prompt, answer 0, answer 1, ...; the prompt once per pair.

    Attributes:
        tokens: Shape (T,), int64.
        lengths: Per pair: prompt tokens, then tokens of each answer. Empty for a microbatch without pairs.
        num_tokens: Shape (A,), int64: completion tokens of an answer.
        ref_logps: Shape (A,), float32, nats; None where the objective needs no reference.
        weights: Shape (P,), float32: what each pair's loss counts; None: all alike.
        margins: Shape (P,), float32: by how much each chosen answer is to be better; None: by nothing.
    """

    tokens: torch.Tensor
    lengths: list[list[int]]
    num_tokens: torch.Tensor
    ref_logps: torch.Tensor | None
    weights: torch.Tensor | None = None
    margins: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """One rank's part of one global batch.

    Attributes:
        step: The optimizer step, counted from 1, that this batch feeds.
        epoch: Counted from 0.
        num_pairs: Pairs of the whole global batch, over all ranks: the loss's denominator.
        pair_ids: Ids of the whole global batch in plan order.
        microbatches: This rank's part; every rank has the same number.
        microbatch_pair_ids: Per microbatch, the ids of its pairs.
        reference_wait_s: Seconds that making it has waited for scores.
    """

    step: int
    epoch: int
    num_pairs: int
    pair_ids: list[bytes]
    microbatches: list[Microbatch]
    microbatch_pair_ids: list[list[bytes]]
    reference_wait_s: float = 0.0


@dataclass(slots=True)
class TrainState:
    """What a run is, apart from tensors: all of it is in the checkpoint's manifest.

    Attributes:
        step: Global batches done: the one integer that says where training stands.
        num_tokens: Unique tokens trained on so far.
        best_metric: The metric that the next two are about; None before the first evaluation that counts.
        best_step: The step whose evaluation was the best so far.
        best_value: Its value.
        reference_attempt: The attempt that made the reference as it is, where it follows the policy.
        num_pairs: Pairs trained on so far.
        mean_reward: Over their answers as they were trained on, a pair's chosen and rejected ones weighing the same.
    """

    step: int = 0
    num_tokens: int = 0
    best_metric: str | None = None
    best_step: int | None = None
    best_value: float | None = None
    reference_attempt: int = 0
    num_pairs: int = 0
    mean_reward: float = 0.0


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a worker group: all ranks and the stream use exactly this.

    Attributes:
        attempt: Counted from 0 over the life of a run.
        generation: Of the run's lease: each driver has a higher one than those before it.
        position: Global batches done before this attempt.
        checkpoint: Name of the checkpoint to load, or None for a fresh start.
        world_size: Policy workers.
        reason: Why the group was started.
        time: When, in ISO 8601.
        reference_attempt: The checkpoint's (see `TrainState`).
    """

    attempt: int
    generation: int
    position: int
    checkpoint: str | None
    world_size: int
    reason: str
    time: str
    reference_attempt: int = 0


# What a rank does while it waits for a batch, which never counts as a hang.
WAITING = "waiting for pairs"


class Control(Protocol):
    """How the train loop says what it does, and hears that it shall end."""

    def doing(self, what: str) -> None:
        """Something begins; what came before it has ended. A loop that says nothing for long is taken for hung."""

    def leaving(self) -> bool:
        """Whether this rank has been asked to write a checkpoint and end; ranks may hear it at different steps."""


class HeldOutPairs(Protocol):
    """What an evaluation needs of its surroundings: see `WorkerContext`."""

    @property
    def control(self) -> Control: ...

    @property
    def eval_sets(self) -> tuple[str, ...]: ...

    @property
    def eval_batches(self) -> Callable[[str, int, int], Iterator[GlobalBatch]]: ...


class Recording(Protocol):
    """What a recorder needs from its context: see `WorkerContext`."""

    @property
    def attempt(self) -> Attempt: ...

    @property
    def publish(self) -> Callable[[dict[str, Any]], None]: ...

    @property
    def fence(self) -> Callable[[], None]: ...

    @property
    def group(self) -> int: ...

    @property
    def total_steps(self) -> int: ...


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What the train loop knows of its surroundings: no Ray in here.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: Policy workers.
        group: So many of them, one after the other, share a copy of the weights.
        device: Where this rank computes.
        attempt: The checkpoint and position to start from.
        batches: From the tokens of a microbatch, this rank's part of each global batch from the attempt's position on.
        eval_sets: The names of the held-out sets; of the only one, where it has none, the empty text.
        eval_batches: From such a name, a step and the tokens of a microbatch, this rank's part of the set's batches.
        publish: Called on rank 0 with each line of metrics, and with the step of each checkpoint.
        control: What the loop says of its progress, and hears.
        fence: Raises when another attempt has begun: called before anything durable is written.
        total_steps: Where training ends.
        steps_per_epoch: Global batches of one epoch.
        sources: Where the pairs of a step come from, by id, for people to read.
        feeds: What is behind `batches` and, by set, `eval_batches`: see `training.feed`.
    """

    rank: int
    world_size: int
    group: int
    device: torch.device
    attempt: Attempt
    batches: Callable[[int], Iterator[GlobalBatch]]
    eval_sets: tuple[str, ...]
    eval_batches: Callable[[str, int, int], Iterator[GlobalBatch]]
    publish: Callable[[dict[str, Any]], None]
    control: Control
    fence: Callable[[], None]
    total_steps: int
    steps_per_epoch: int
    sources: Callable[[int], dict[bytes, str]]
    feeds: tuple[Any, Any]
