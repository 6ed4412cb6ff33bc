"""One forward pass over a microbatch: the log-probability of every answer.

The layout is plain: one row per answer, prompt + answer, padded on the right, which any causal language model reads.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn

from dpo_ray.objective.logps import completion_positions, sum_by_answer, token_logps
from dpo_ray.types import Microbatch


def answer_logps(model: nn.Module, batch: Microbatch) -> torch.Tensor:
    """Summed completion log-probability of each answer.

    Args:
        model: A causal language model of transformers, sharded or not.
        batch: At least one pair, on any device.

    Returns:
        Shape (A,), float32, nats, with gradient where the model's parameters have it.

    Collective: all ranks, where the model is sharded.
    """
    device = next(model.parameters()).device
    input_ids, attention_mask, rows, positions = _rows(batch)
    input_ids = input_ids.to(device)
    first, last = int(positions.min()), int(positions.max())
    arguments = {"input_ids": input_ids, "attention_mask": attention_mask.to(device), "use_cache": False}
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        # Only positions from the first to the last that predict a completion token go through the LM head.
        arguments["logits_to_keep"] = torch.arange(first, last + 1, device=device)
    else:
        first = 0
    logits = model(**arguments).logits
    rows, positions = rows.to(device), positions.to(device)
    per_token = token_logps(logits[rows, positions - first], input_ids[rows, positions + 1])
    return sum_by_answer(per_token, rows, len(batch.num_tokens))


def empty_pass(model: nn.Module) -> torch.Tensor:
    """A forward pass without pairs, worth zero: keeps this rank in step with the others' collectives.

    Collective: all ranks, where the model is sharded.
    """
    device = next(model.parameters()).device
    return model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False).logits.sum() * 0.0


def _rows(batch: Microbatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input ids and mask, Shape (A, longest); row and position of every logit that predicts a completion token."""
    sequences, start = list[torch.Tensor](), 0
    rows, positions = list[int](), list[int]()
    for prompt, *answers in batch.lengths:
        stop = start + prompt
        for length in answers:
            sequences.append(torch.cat([batch.tokens[start : start + prompt], batch.tokens[stop : stop + length]]))
            predicting = completion_positions(prompt, length)
            rows += [len(sequences) - 1] * length
            positions += predicting
            stop += length
        start = stop
    input_ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return input_ids, mask, torch.tensor(rows), torch.tensor(positions)
