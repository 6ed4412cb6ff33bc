"""The reference model at work: inference only, no gradients, dropout off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from dpo_ray.model.forward import answer_scores, empty_pass, settle_layout, with_token_scores
from dpo_ray.model.load import load_pretrained
from dpo_ray.model.malloc import keep_freed_memory
from dpo_ray.model.shard import release_gathered, sharded_reference
from dpo_ray.pairs.pack import Costs, microbatch, microbatches, spread
from dpo_ray.types import ScoredPair, TokenizedPair


class Scorer:
    """A reference model on one device, or sharded over the ranks of the process group."""

    def __init__(
        self,
        path: str,
        dtype: str,
        attention: str,
        tokens_per_microbatch: int,
        device: torch.device,
        sharded: bool = False,
        per_token: bool = False,
        weights: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Loads the model.

        Args:
            path: transformers directory.
            dtype: dtype of the weights, and so of the scoring.
            attention: "packed", or transformers' attention implementation.
            tokens_per_microbatch: Tokens of one forward pass.
            device: Where to compute.
            sharded: Whether all ranks hold one model together, and share the pairs.
            per_token: See `score_pairs`.
            weights: Gives the model other weights than those in `path`.

        Collective: all ranks, where sharded.
        """
        self._tokens_per_microbatch, self._per_token = tokens_per_microbatch, per_token
        self._group: dist.ProcessGroup | None = None
        if sharded:
            self.model = sharded_reference(path, dtype, attention, device)
            if weights is not None:
                weights(self.model)
            self._group = dist.new_group(backend="gloo")
            return
        model = load_pretrained(path, dtype, attention)
        if weights is not None:
            weights(model)
        model = model.to(device).eval().requires_grad_(False)
        self.model = with_token_scores(model, device)
        settle_layout(self.model)
        keep_freed_memory()

    def score(self, pairs: Sequence[TokenizedPair], moved: Callable[[], None] = lambda: None) -> list[np.ndarray]:
        """`score_pairs` with this model.

        Collective: all ranks, where sharded.
        """
        return score_pairs(self.model, pairs, self._tokens_per_microbatch, self._group, moved, self._per_token)


@torch.no_grad()
def score_pairs(
    model: PreTrainedModel,
    pairs: Sequence[TokenizedPair],
    tokens_per_microbatch: int,
    group: dist.ProcessGroup | None,
    moved: Callable[[], None],
    per_token: bool = False,
) -> list[np.ndarray]:
    """Completion log-probabilities.

    Args:
        model: Prepared by `with_token_scores`.
        pairs: The same on all ranks.
        tokens_per_microbatch: Tokens of one forward pass.
        group: Of all ranks, with a backend for the CPU, where the model is sharded over them; else None.
        moved: Called after each forward pass.
        per_token: Whether those of each token are wanted, and not their sums over an answer.

    Returns:
        Per pair, in the given order, float32, nats: Shape (answers,), or Shape (completion tokens,), answer by answer.

    Collective: all ranks of the group.
    """
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if group is not None else (0, 1)
    lengths = [list(map(len, pair.parts)) for pair in pairs]
    shares = spread([Costs().of(each) for each in lengths], num_ranks)
    of_ranks = [[lengths[index] for index in share] for share in shares]
    found: dict[int, np.ndarray] = {}
    for indices in microbatches(of_ranks, rank, tokens_per_microbatch, Costs()):
        found |= _score(model, [shares[rank][index] for index in indices], pairs, per_token)
        moved()
    if group is not None:
        release_gathered(model)
        everyones: list[dict[int, np.ndarray]] = [{} for _ in range(num_ranks)]
        dist.all_gather_object(everyones, found, group=group)
        found = {index: scores for each in everyones for index, scores in each.items()}
    return [found[index] for index in range(len(pairs))]


def _score(
    model: PreTrainedModel, indices: Sequence[int], pairs: Sequence[TokenizedPair], per_token: bool
) -> dict[int, np.ndarray]:
    """One forward pass."""
    if not indices:
        empty_pass(model)
        return {}
    batch = microbatch([ScoredPair(pairs[index], None) for index in indices])
    if per_token:
        logps, sizes = (
            model.token_scores(batch.tokens, batch.lengths)[0].logps,
            [sum(each[1:]) for each in batch.lengths],
        )
    else:
        logps, sizes = answer_scores(model, batch).logps, [len(each) - 1 for each in batch.lengths]
    return dict(zip(indices, np.split(logps.float().cpu().numpy(), np.cumsum(sizes)[:-1]), strict=True))
