"""Log-probabilities of completions.

The only label shift is here: `completion_positions` says which position predicts which token, and everything after it
sees hidden states or logits and their targets side by side.

Shapes: N completion tokens, A answers, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Logits that a softmax has in full precision at once; on CPUs so few that they stay in the cache from pass to pass.
_BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}
# Tokens whose logits are computed at once, fewer where the vocabulary is large: each block adds to the gradient of the
# whole output layer, which on a GPU takes as long as many tokens.
_HEAD_ROWS = {"cpu": 512, "cuda": 4096}
_BLOCK_LOGITS = 2**29
# Logits that a forward pass may leave behind.
_KEPT_ELEMENTS = 2**26


class Scores(NamedTuple):
    """What a model says of completion tokens: Shape (N,) each, or, summed by answer, Shape (A,) each.

    Attributes:
        logps: Log-probability, nats, with gradient.
        entropy: Of the distribution that a token was predicted by, nats, without gradient.
        mean_logits: The mean over the vocabulary, without gradient.
        alignment: log p - log sum_v p_v^2, which for a sampled token is the log-probability without what an expected
            token would have of it, nats, without gradient.
    """

    logps: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    alignment: torch.Tensor


def completion_positions(lengths: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where in a pack the completion tokens are, and what predicts them.

    A completion's first token is predicted at the last token of its prompt, which stands in the pack once for all of
    its answers.

    Args:
        lengths: Per pair: prompt tokens, at least 1, then tokens of each answer, in the order in which they stand.

    Returns:
        For each completion token: the position that predicts it, its own position, and its answer, counted over the
        pack. Shape (N,) each, int64.

    Raises:
        ValueError: Nothing stands before an answer, so that nothing predicts its first token.
    """
    predicting, targets, answer_of, start, answer = list[int](), list[int](), list[int](), 0, 0
    for prompt, *answers in lengths:
        if prompt < 1:
            raise ValueError(f"an answer needs at least 1 token before it to be predicted from, got {prompt}")
        last = start + prompt - 1
        start += prompt
        for length in answers:
            own = range(start, start + length)
            targets += own
            predicting += [last, *own[:-1]][:length]
            answer_of += [answer] * length
            start, answer = own.stop, answer + 1
    return torch.tensor(predicting), torch.tensor(targets), torch.tensor(answer_of)


def completion_token_scores(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    device_type: str | None = None,
) -> Scores:
    """`token_scores` of each completion token, from hidden states.

    The logits are made for a block of tokens at a time. Those of the first blocks are kept for the backward pass, up to
    a fixed amount of memory; the others are computed again there.

    Args:
        hidden: Shape (N, D), any floating dtype: at the positions that predict the targets.
        targets: Shape (N,), int64.
        head: Hidden states -> logits, Shape (rows, V).
        vocab_size: V.
        device_type: Of blocks for this type of device; None: of that which the tensors are on.
    """
    device_type = device_type or hidden.device.type

    def block(hidden: torch.Tensor, targets: torch.Tensor) -> Scores:
        return token_scores(head(hidden), targets, device_type)

    found, kept_rows = [], _KEPT_ELEMENTS // vocab_size
    rows = min(_HEAD_ROWS[device_type], max(1, _BLOCK_LOGITS // vocab_size))
    for states, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        kept_rows -= len(wanted)
        if kept_rows >= 0 or not torch.is_grad_enabled():
            found.append(block(states, wanted))
        else:
            found.append(checkpoint(block, states, wanted, use_reentrant=False, preserve_rng_state=False))
    return Scores(*map(torch.cat, zip(*found, strict=True)))


def token_scores(logits: torch.Tensor, targets: torch.Tensor, device_type: str | None = None) -> Scores:
    """Log-probability of each target token, and what the distribution that it was predicted by is like.

    Besides the logits, only N numbers are kept for the backward pass: the full-precision copy that a softmax over
    bfloat16 logits needs exists for a block of rows at a time, forward and backward.

    Args:
        logits: Shape (N, V), any floating dtype: the scores at the positions that predict the targets.
        targets: Shape (N,), int64.
        device_type: See `completion_token_scores`.

    Returns:
        Shape (N,) each; float64 for float64 logits, else float32.
    """
    elements = _BLOCK_ELEMENTS[device_type or logits.device.type]
    return Scores(*_TokenScores.apply(logits, targets, elements))  # type: ignore[no-untyped-call,unused-ignore]


def sum_by_answer(token_logps: torch.Tensor, answer: torch.Tensor, num_answers: int) -> torch.Tensor:
    """Summed completion log-probability of each answer.

    Accumulates in float64 and in a fixed order, so that an answer's sum does not depend on what stands around it and
    is the same at every run.

    Args:
        token_logps: Shape (N,), float32 or float64, nats.
        answer: Shape (N,), int64: the answer each token belongs to, 0 .. num_answers - 1.
        num_answers: A.

    Returns:
        Shape (A,), the dtype of `token_logps`, nats; 0 for an answer without tokens.
    """
    sums = torch.zeros(num_answers, dtype=torch.float64, device=token_logps.device)
    values = token_logps.double()
    if values.is_cuda:
        # index_add is atomic there; index_put sorts by index first.
        return sums.index_put((answer,), values, accumulate=True).to(token_logps.dtype)
    return sums.index_add(0, answer, values).to(token_logps.dtype)


class _TokenScores(torch.autograd.Function):
    """log p(target) = logit(target) - logsumexp(logits), a block of rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, elements: int) -> tuple[torch.Tensor, ...]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_normalizers, entropy, means, squares = logits.new_empty((4, len(logits)), dtype=dtype)
        for rows in _row_blocks(logits, elements):
            scores = logits[rows].to(dtype)
            means[rows] = scores.mean(dim=-1)
            largest = scores.amax(dim=-1)
            weights = (scores - largest[:, None]).exp_()
            total = weights.sum(dim=-1)
            log_normalizers[rows] = largest + total.log()
            entropy[rows] = log_normalizers[rows] - torch.linalg.vecdot(weights, scores) / total
            squares[rows] = torch.linalg.vecdot(weights, weights).log() - 2 * total.log()
        logps = logits.gather(-1, targets[:, None])[:, 0].to(dtype) - log_normalizers
        alignment = logps - squares
        ctx.save_for_backward(logits, targets, log_normalizers)
        ctx.elements = elements
        ctx.mark_non_differentiable(entropy, means, alignment)
        return logps, entropy, means, alignment

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, grad_output: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, targets, log_normalizers = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for rows in _row_blocks(logits, ctx.elements):
            probs = (logits[rows].to(log_normalizers.dtype) - log_normalizers[rows, None]).exp_()
            block = probs.mul_(-grad_output[rows, None])
            block[torch.arange(len(block), device=block.device), targets[rows]] += grad_output[rows]
            grad_logits[rows] = block
        return grad_logits, None, None


def _row_blocks(logits: torch.Tensor, elements: int) -> Iterator[slice]:
    height = max(1, elements // logits.shape[1])
    for start in range(0, len(logits), height):
        yield slice(start, start + height)
