"""Attention over a pack: pairs side by side in one sequence, each prompt once, and nothing sees its neighbours.

An answer's tokens see their prompt and the answer up to themselves, and take positions that continue the prompt's.

Shapes: T tokens of the pack, H query heads, G key and value heads, D head dimension.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from dpo_ray.model.linear import widens

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask  # Brings a compiler, which CPUs have no use for here.

# What transformers calls it: see the end of this file.
PACKED = "packed"
# On CPUs PyTorch's backward pass over so few tokens takes up to twice as long in bfloat16 as in float32.
_SHORT = 256


class Pack:
    """What stands where in a pack. Masks are made when first needed, and serve all layers."""

    def __init__(self, lengths: Sequence[Sequence[int]], device: torch.device) -> None:
        """Nothing is computed yet.

        Args:
            lengths: Per pair: prompt tokens, then tokens of each answer, in the order in which they stand.
            device: Where attention runs.
        """
        self.lengths = lengths
        self._device = device
        self._answer_masks: dict[tuple[int, int, int | None], torch.Tensor] = {}
        self._block_masks: dict[int | None, BlockMask] = {}

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """Shape (1, T), int64: each answer goes on where its prompt ends."""
        parts = []
        for prompt, *answers in self.lengths:
            parts.append(torch.arange(prompt))
            parts += [torch.arange(prompt, prompt + length) for length in answers]
        return torch.cat(parts)[None].to(self._device)

    def answer_mask(self, prompt: int, answer: int, window: int | None) -> torch.Tensor:
        """What an answer's tokens see of prompt + answer: Shape (answer, prompt + answer), bool."""
        key = (prompt, answer, window)
        if key not in self._answer_masks:
            positions = torch.arange(prompt + answer, device=self._device)
            queries, keys = positions[prompt:, None], positions
            mask = keys <= queries
            self._answer_masks[key] = mask if window is None else mask & (queries - keys < window)
        return self._answer_masks[key]

    def block_mask(self, window: int | None) -> BlockMask:
        """The whole pack's mask for FlexAttention."""
        from torch.nn.attention.flex_attention import create_block_mask

        if window not in self._block_masks:
            num_tokens = self.position_ids.shape[1]
            make = _compiled(create_block_mask) if self._device.type == "cuda" else create_block_mask
            self._block_masks[window] = make(
                self._mask_mod(window), B=None, H=None, Q_LEN=num_tokens, KV_LEN=num_tokens, device=self._device
            )
        return self._block_masks[window]

    def _mask_mod(self, window: int | None) -> Callable[..., torch.Tensor]:
        pair, answer = self._owners
        position = self.position_ids[0]

        def sees(_b: torch.Tensor, _h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            own = (pair[query] == pair[key]) & ((answer[key] == 0) | (answer[key] == answer[query]))
            near = position[query] - position[key]
            return own & (near >= 0) & (near < window) if window is not None else own & (near >= 0)

        return sees

    @cached_property
    def _owners(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token its pair, and which answer it belongs to, counted from 1; 0 in a prompt. Shape (T,), int32."""
        sizes = torch.tensor([length for lengths in self.lengths for length in lengths])
        pair = [index for index, lengths in enumerate(self.lengths) for _ in lengths]
        answer = [index for lengths in self.lengths for index in range(len(lengths))]
        pair_of, answer_of = (torch.tensor(ids, dtype=torch.int32).repeat_interleave(sizes) for ids in (pair, answer))
        return pair_of.to(self._device), answer_of.to(self._device)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    pack: Pack | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention of a layer, as transformers asks for it.

    Args:
        module: The layer.
        query: Shape (1, H, T, D).
        key: Shape (1, G, T, D).
        value: Shape (1, G, T, D).
        attention_mask: None: the pack says who sees whom.
        pack: Passed down through the model's keyword arguments; None: the sequence is one text.
        scaling: Of the scores; None: one over the root of D.
        sliding_window: How far back a token sees, itself included; None: to the beginning.
        softcap: Bound of the scores, as Gemma 2 has it.

    Returns:
        Shape (1, T, H, D), and no weights.

    Raises:
        ValueError: There is more than one sequence.
    """
    if len(query) != 1:
        raise ValueError(f"packed attention of {type(module).__name__} wants one sequence, got {len(query)}")
    if pack is None:
        pack = Pack([[query.shape[2]]], query.device)
    if query.is_cuda:
        return _by_block(query, key, value, pack, scaling, sliding_window, softcap).transpose(1, 2), None
    longest_wide = 0
    if query.dtype == torch.bfloat16:
        longest_wide = sys.maxsize if widens(query.dtype, query.device) else _SHORT if torch.is_grad_enabled() else 0
    found = _by_pair(query, key, value, pack, scaling, sliding_window, softcap, longest_wide)
    return found.transpose(1, 2), None


def _by_pair(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pack: Pack,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    longest_wide: int = 0,
) -> torch.Tensor:
    """For CPUs: each pair by itself, so that nothing of the size of the whole pack's mask is ever computed.

    Over up to `longest_wide` tokens in float32, over more in the dtype that is given.
    """
    given = query.dtype
    wide = any(prompt + length <= longest_wide for prompt, *answers in pack.lengths for length in answers)
    if wide:  # All at once: to cast many small parts takes far longer.
        query, key, value = query.float(), key.float(), value.float()

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if wide and key.shape[2] > longest_wide:
            return _attend(query.to(given), key.to(given), value.to(given), mask, scaling, softcap).float()
        return _attend(query, key, value, mask, scaling, softcap)

    sizes = [size for prompt, *answers in pack.lengths for size in (prompt + sum(answers[:1]), *answers[1:])]
    # Split and not slices: the gradient of a slice is as large as the whole.
    parts = zip(*(states.split(sizes, dim=2) for states in (query, key, value)), strict=True)
    found = []
    for prompt, *answers in pack.lengths:
        queries, keys, values = next(parts)
        first = queries.shape[2]
        mask = None if window is None or first <= window else pack.answer_mask(0, first, window)
        found.append(attend(queries, keys, values, mask))
        for length in answers[1:]:
            queries, own_keys, own_values = next(parts)
            own_keys = torch.cat([keys[:, :, :prompt], own_keys], dim=2)
            own_values = torch.cat([values[:, :, :prompt], own_values], dim=2)
            found.append(attend(queries, own_keys, own_values, pack.answer_mask(prompt, length, window)))
    return torch.cat(found, dim=2).to(given)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention with a mask, or causal without one."""
    grouped = query.shape[1] != key.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    if grouped:
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def _by_block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pack: Pack,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """For GPUs: one kernel over the pack that skips the blocks in which nothing sees anything."""

    from torch.nn.attention.flex_attention import flex_attention

    run: Any = _compiled(flex_attention) if query.is_cuda else flex_attention
    found: torch.Tensor = run(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=pack.block_mask(window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return found


@cache
def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    def capped(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.tanh(score / softcap) * softcap

    return capped


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Sizes that are seen to change become dynamic, so that a few compilations serve all packs; one too many shall fail,
    # and not run uncompiled, where FlexAttention would hold all scores of the pack. Not dynamic=True: a number such as
    # the soft cap would become a tensor, which the kernel cannot take.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    return torch.compile(function, fullgraph=True)


AttentionInterface.register(PACKED, packed_attention)
