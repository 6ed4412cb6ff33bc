"""The reference model at work: inference only, no gradients, dropout off."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dpo_ray.model.forward import answer_scores, settle_layout, with_token_scores
from dpo_ray.model.load import load_pretrained
from dpo_ray.pairs.pack import Costs, microbatch, microbatches
from dpo_ray.types import ScoredPair, TokenizedPair


class Scorer:
    """A reference model on one device."""

    def __init__(self, path: str, dtype: str, attention: str, tokens_per_microbatch: int, device: torch.device) -> None:
        """Loads the model.

        Args:
            path: transformers directory.
            dtype: dtype of the weights, and so of the scoring.
            attention: transformers' attention implementation.
            tokens_per_microbatch: Tokens of one forward pass.
            device: Where to compute.
        """
        self.tokens_per_microbatch = tokens_per_microbatch
        self.device = device
        model = load_pretrained(path, dtype, attention).to(device).eval().requires_grad_(False)
        self.model = with_token_scores(model, device)
        settle_layout(self.model)

    @torch.inference_mode()
    def score(self, pairs: Sequence[TokenizedPair]) -> list[np.ndarray]:
        """Summed completion log-probabilities.

        Returns:
            Per pair, in the given order, Shape (answers,), float32, nats.
        """
        scores: list[np.ndarray] = [np.zeros(0, np.float32)] * len(pairs)
        lengths = [list(map(len, pair.parts)) for pair in pairs]
        for indices in microbatches([lengths], 0, self.tokens_per_microbatch, Costs()):
            group = [ScoredPair(pairs[index], None) for index in indices]
            flat = answer_scores(self.model, microbatch(group)).logps.float().cpu().numpy()
            bounds = np.cumsum([len(scored.pair.answers) for scored in group])[:-1]
            for index, part in zip(indices, np.split(flat, bounds), strict=True):
                scores[index] = part
        return scores
