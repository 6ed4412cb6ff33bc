"""Scores that users bring with their data: believed after a sample of each chunk was scored and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dpo_ray.errors import DataError
from dpo_ray.pairs.store import Chunk, sources_of
from dpo_ray.types import TokenizedPair

SAMPLE_PAIRS = 8
# Mean difference per token, in nats, that another software's numerics explain.
TOLERANCE = 0.05


def check_brought(
    pairs_uri: str,
    chunk: Chunk,
    pairs: Sequence[TokenizedPair],
    brought: Sequence[np.ndarray],
    score: Callable[[Sequence[TokenizedPair]], list[np.ndarray]],
) -> None:
    """Compares the scores that came with a chunk's first pairs (ids are digests: any are a sample) with the model's.

    Args:
        pairs_uri: The pair store.
        chunk: The chunk.
        pairs: Its pairs, in store order.
        brought: Their scores: Shape (answers,) each, nats.
        score: The reference's own, of some pairs.

    Raises:
        DataError: They are not the reference's summed log-probabilities.
    """
    sample = pairs[:SAMPLE_PAIRS]
    lengths = np.array([[len(answer) for answer in pair.answers] for pair in sample])
    own, theirs = np.stack(score(sample)), np.stack(brought[:SAMPLE_PAIRS])
    gaps = np.abs(own - theirs) / lengths
    if gaps.mean() <= TOLERANCE:
        return
    pair, answer = np.unravel_index(gaps.argmax(), gaps.shape)
    looks_like = ""
    if np.abs(own / lengths - theirs).mean() <= TOLERANCE:
        looks_like = " (they look like means over an answer's tokens: multiply them by its number of tokens)"
    place = sources_of(pairs_uri, chunk)[sample[pair].pair_id]
    raise DataError(
        f"{place}: reference.columns brings {theirs[pair, answer]:.6g} for "
        f"answer {answer} of {lengths[pair, answer]} tokens, the reference gives {own[pair, answer]:.6g}; of "
        f"{len(sample)} pairs they differ by {gaps.mean():.3g} nats per token on average, numerics explain "
        f"{TOLERANCE:g}{looks_like}: name the model that they come from as reference.path, see that template and "
        "tokenizer are the same, or leave reference.columns out"
    )
