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
            weights: Gives the model other weights than those in `path`.

        Collective: all ranks, where sharded.
        """
        self.tokens_per_microbatch = tokens_per_microbatch
        self.device, self.sharded = device, sharded
        if sharded:
            self.model = sharded_reference(path, dtype, attention, device)
            if weights is not None:
                weights(self.model)
            self._gather = dist.new_group(backend="gloo")
            return
        model = load_pretrained(path, dtype, attention)
        if weights is not None:
            weights(model)
        model = model.to(device).eval().requires_grad_(False)
        self.model = with_token_scores(model, device)
        settle_layout(self.model)
        keep_freed_memory()

    @classmethod
    def of(cls, model: PreTrainedModel, tokens_per_microbatch: int, group: dist.ProcessGroup) -> Scorer:
        """A scorer over a model that is there, sharded over all ranks.

        Args:
            model: Prepared by `with_token_scores`.
            tokens_per_microbatch: Tokens of one forward pass.
            group: Of all ranks, with a backend for the CPU.
        """
        scorer = cls.__new__(cls)
        scorer.tokens_per_microbatch, scorer.sharded = tokens_per_microbatch, True
        scorer.model, scorer.device, scorer._gather = model, model.runs_on, group
        return scorer

    @torch.no_grad()
    def score(self, pairs: Sequence[TokenizedPair], moved: Callable[[], None] = lambda: None) -> list[np.ndarray]:
        """Summed completion log-probabilities.

        Args:
            pairs: The same on all ranks.
            moved: Called after each forward pass.

        Returns:
            Per pair, in the given order, Shape (answers,), float32, nats.

        Collective: all ranks, where sharded.
        """
        rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if self.sharded else (0, 1)
        lengths = [list(map(len, pair.parts)) for pair in pairs]
        shares = spread([Costs().of(each) for each in lengths], num_ranks)
        of_ranks = [[lengths[index] for index in share] for share in shares]
        found: dict[int, np.ndarray] = {}
        for group in microbatches(of_ranks, rank, self.tokens_per_microbatch, Costs()):
            found |= self._score([shares[rank][index] for index in group], pairs)
            moved()
        if self.sharded:
            release_gathered(self.model)
            everyones: list[dict[int, np.ndarray]] = [{} for _ in range(num_ranks)]
            dist.all_gather_object(everyones, found, group=self._gather)
            found = {index: scores for each in everyones for index, scores in each.items()}
        return [found[index] for index in range(len(pairs))]

    def _score(self, indices: Sequence[int], pairs: Sequence[TokenizedPair]) -> dict[int, np.ndarray]:
        """One forward pass."""
        if not indices:
            empty_pass(self.model)
            return {}
        batch = [ScoredPair(pairs[index], None) for index in indices]
        flat = answer_scores(self.model, microbatch(batch)).logps.float().cpu().numpy()
        bounds = np.cumsum([len(scored.pair.answers) for scored in batch])[:-1]
        return dict(zip(indices, np.split(flat, bounds), strict=True))
