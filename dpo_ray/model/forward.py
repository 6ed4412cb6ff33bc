"""One forward pass over a microbatch: the log-probability of every answer.

Two layouts. Packed: one sequence, pairs side by side, each prompt once. Plain, for models whose attention cannot be
packed: one row per answer, prompt + answer, padded on the right, which any causal language model reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import MethodType
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu
from transformers import PreTrainedModel

from dpo_ray.errors import ConfigError
from dpo_ray.model.attention import PACKED, Pack
from dpo_ray.model.linear import widen_products, widens
from dpo_ray.objective.logps import (
    Scores,
    completion_positions,
    completion_token_scores,
    sum_by_answer,
    token_scores,
)
from dpo_ray.pairs.pack import token_weights
from dpo_ray.types import Microbatch

log = logging.getLogger(__name__)

# Mean difference per token, in nats, that numerics alone explain between two ways to compute the same; where the plain
# layout differs more, twice as much as it.
LAYOUT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
# Beyond it even the plain layout computes something else.
HEAD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# Longer windows are not tried at the start: it would take as long as a step.
LONGEST_TRIED_WINDOW = 4096
# FlexAttention compiles other kernels for short sequences, and works in blocks of this many tokens.
GPU_SHORTEST, GPU_BLOCK = 256, 128


def answer_scores(model: nn.Module, batch: Microbatch, ld_alpha: float = 1.0) -> Scores:
    """What the model says of each answer, summed over its completion tokens.

    Args:
        model: A model that `with_token_scores` has prepared, sharded or not.
        batch: At least one pair, on any device.
        ld_alpha: See `token_weights`: of the log-probabilities.

    Returns:
        Shape (A,) each, float32, with gradient where the model's parameters have it.

    Collective: all ranks, where the model is sharded.
    """
    per_token, answers = cast(Any, model).token_scores(batch.tokens, batch.lengths)
    if ld_alpha != 1.0:
        weights = torch.from_numpy(token_weights([lengths[1:] for lengths in batch.lengths], ld_alpha))
        per_token = per_token._replace(logps=per_token.logps * weights.to(per_token.logps.device))
    return Scores(*(sum_by_answer(values, answers, len(batch.num_tokens)) for values in per_token))


def empty_pass(model: nn.Module) -> torch.Tensor:
    """A forward pass without pairs, worth zero: keeps this rank in step with the others' collectives.

    Collective: all ranks, where the model is sharded.
    """
    per_token, _ = cast(Any, model).token_scores(torch.zeros(2, dtype=torch.int64), [[1, 1]])
    return per_token.logps.sum() * 0.0


def with_token_scores(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Gives a model a second way forward, `token_scores(tokens, lengths)`, that never holds the logits of all tokens.

    It reads packs where the model was loaded with packed attention.

    Args:
        model: Any causal language model.
        device: Where it computes, wherever its weights are in between.
    """
    model.runs_on = device
    model.packed = model.config._attn_implementation == PACKED
    model.saves_on_host = False
    model.token_scores = MethodType(_token_scores, model)
    widen_products(model)
    return model


def settle_layout(model: PreTrainedModel) -> None:
    """Lays pairs out plainly where the model does not score packed pairs as it scores single answers.

    State-space layers, for one, which carry what they have read from one pair into the next.

    Args:
        model: A model that `with_token_scores` has prepared, sharded where it will be.

    Raises:
        ConfigError: Laid out plainly it does not either.

    Collective: all ranks, where the model is sharded.
    """
    config, wanted = model.config.get_text_config(), model.config._attn_implementation
    plain = wanted if wanted != PACKED else "sdpa" if model._supports_sdpa else "eager"
    lengths = [[5, 7, 3], [1, 2, 6]]
    window = getattr(config, "sliding_window", None)
    beyond = [[window - 2, 3, 9]] if window and window <= LONGEST_TRIED_WINDOW else []
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (sum(map(sum, lengths + beyond)),), generator=generator)
    short, long = tokens.split([sum(map(sum, lengths)), sum(map(sum, beyond))])
    with torch.no_grad():
        _set_layout(model, plain)
        expected, dtype = _one_by_one(model, short, lengths)
        noise = _gap(model, short, lengths, expected)
        if noise > HEAD_TOLERANCE[dtype]:
            raise ConfigError(
                f"{type(model).__name__}: log-probabilities from hidden states and from the model's own logits differ "
                f"by {noise:.3g} nats per token: it does more after its output layer than dpo_ray knows of"
            )
        if wanted != PACKED:
            return
        expected_long = model.token_scores(long, beyond)[0].logps if beyond else None
        _set_layout(model, PACKED)
        gap = _gap(model, short, lengths, expected)
        if expected_long is not None:
            gap = max(gap, _gap(model, long, beyond, expected_long))
    if gap > max(LAYOUT_TOLERANCE[dtype], 2 * noise):
        log.warning(
            "%s does not score packed pairs as it scores single answers (they differ by %.3g nats per token): each "
            "answer gets a row of its own, with its prompt and padding; set model.attention: %s to say so",
            type(model).__name__,
            gap,
            plain,
        )
        _set_layout(model, plain)


def _set_layout(model: PreTrainedModel, attention: str) -> None:
    model.set_attn_implementation(attention)
    model.packed = model.config._attn_implementation == PACKED


def _one_by_one(
    model: PreTrainedModel, tokens: torch.Tensor, lengths: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.dtype]:
    """Log-probability of each completion token from the model's own logits, an answer at a time: Shape (N,).

    And the dtype of the logits.
    """
    found, start = [], 0
    for prompt, *answers in lengths:
        stop = start + prompt
        for length in answers:
            whole = torch.cat([tokens[start : start + prompt], tokens[stop : stop + length]]).to(model.runs_on)
            logits = model(input_ids=whole[None], use_cache=False).logits[0, prompt - 1 : -1]
            found.append(token_scores(logits, whole[prompt:]).logps)
            stop += length
        start = stop
    return torch.cat(found), logits.dtype


def _gap(
    model: PreTrainedModel, tokens: torch.Tensor, lengths: Sequence[Sequence[int]], expected: torch.Tensor
) -> float:
    """Mean difference per token from what is expected; the largest over all ranks."""
    found, _ = model.token_scores(tokens, lengths)
    gap = (found.logps - expected).abs().mean().nan_to_num(torch.inf)
    if dist.is_initialized():
        dist.all_reduce(gap, op=dist.ReduceOp.MAX)
    return float(gap)


def _token_scores(
    model: PreTrainedModel, tokens: torch.Tensor, lengths: Sequence[Sequence[int]]
) -> tuple[Scores, torch.Tensor]:
    """What the model says of each completion token of a pack, and the answer it belongs to: Shape (N,)."""
    hidden, targets, answers = completion_states(model, tokens, lengths)
    vocab_size = model.config.get_text_config().vocab_size
    return completion_token_scores(hidden, targets, output_layer(model), vocab_size), answers


def completion_states(
    model: PreTrainedModel, tokens: torch.Tensor, lengths: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What stands before the output layer.

    Args:
        model: A model that `with_token_scores` has prepared.
        tokens: Shape (T,), int64: of a pack.
        lengths: Per pair: tokens of the prompt, then of each answer.

    Returns:
        Per completion token: the hidden state that predicts it, Shape (N, D), the token, and the answer that it
        belongs to, Shape (N,) each, int64.
    """
    device = model.runs_on
    if model.packed and device.type == "cuda":
        missing = max(GPU_SHORTEST - len(tokens), -len(tokens) % GPU_BLOCK)
        # A prompt without answers: nothing is predicted from it, and nothing sees it.
        lengths, tokens = [*lengths, *([[missing]] if missing else [])], F.pad(tokens, (0, missing))
    tokens = tokens.to(device)
    predicting, targets, answers = (places.to(device) for places in completion_positions(lengths))
    pack = Pack(lengths, device)
    with save_on_cpu(pin_memory=device.type == "cuda") if model.saves_on_host else nullcontext():
        if model.packed:
            hidden = model.base_model(
                input_ids=tokens[None], position_ids=pack.position_ids, pack=pack, use_cache=False
            ).last_hidden_state[0, predicting]
        else:
            rows, mask = _rows(lengths, device)
            states = model.base_model(input_ids=tokens[rows], attention_mask=mask, use_cache=False).last_hidden_state
            hidden = states[answers, pack.position_ids[0, targets] - 1]
    return hidden, tokens[targets], answers


def _rows(lengths: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """One row per answer: which token of the pack stands where, and the mask of what is not padding."""
    rows, start = [], 0
    for prompt, *answers in lengths:
        stop = start + prompt
        for length in answers:
            rows.append(torch.cat([torch.arange(start, start + prompt), torch.arange(stop, stop + length)]))
            stop += length
        start = stop
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return padded.to(device), mask.long().to(device)


def output_layer(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """From hidden states to logits, as the model's own forward does it."""
    output, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)

    product = output
    if type(output) is nn.Linear and widens(output.weight.dtype, output.weight.device):
        # Once, and not for each block of tokens; the logits stay in float32, where they are needed.
        weight, bias = output.weight.float(), None if output.bias is None else output.bias.float()

        def product(hidden: torch.Tensor) -> torch.Tensor:
            return F.linear(hidden.float(), weight, bias)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits = product(hidden)
        if scale != 1.0:
            logits = logits * scale
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    return head
