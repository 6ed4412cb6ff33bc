"""What only a GPU can show: FlexAttention's compiled kernels, forward and backward, and how often they are compiled."""

import copy

import pytest
import torch
from tiny_models import FAMILIES, make_pairs, tiny
from torch._dynamo.utils import counters

from dpo_ray.model.forward import answer_scores, with_token_scores
from dpo_ray.pairs.pack import microbatch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("kind", FAMILIES)
def test_compiled_attention_equals_pair_by_pair(kind: str) -> None:
    """Values and gradients, against the same model on the CPU."""
    here = tiny(kind)
    there, pairs = copy.deepcopy(here).to("cuda"), microbatch(make_pairs(6))
    there = with_token_scores(there, torch.device("cuda"))
    weights = torch.arange(1.0, 13.0)
    expected, found = answer_scores(here, pairs).logps, answer_scores(there, pairs).logps
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-3)
    (expected * weights).sum().backward()
    (found * weights.to("cuda")).sum().backward()
    scale = max(float(parameter.grad.abs().max()) for parameter in here.parameters())
    for mine, other in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=1e-2, atol=1e-3 * scale)


def test_a_few_compilations_serve_all_packs() -> None:
    """Forward with and without gradients, each with its mask: packs of any length add nothing."""
    model = with_token_scores(tiny("llama").to("cuda"), torch.device("cuda"))
    counters.clear()
    for num in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89):
        pairs = microbatch(make_pairs(num))
        answer_scores(model, pairs).logps.sum().backward()
        with torch.no_grad():
            answer_scores(model, pairs)
    assert counters["stats"]["unique_graphs"] <= 8
