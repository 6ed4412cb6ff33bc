"""What DPO's gradient is: each pair pulls on log pi(y_w) - log pi(y_l) with the weight beta sigma(r_l - r_w).

arXiv 2305.18290 section 4: the weight is how wrongly the implicit reward orders the pair.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_pairs, tiny

from dpo_ray.config import ObjectiveConfig
from dpo_ray.model.forward import answer_scores, with_token_scores
from dpo_ray.model.load import load_pretrained
from dpo_ray.objective.losses import AnswerStats
from dpo_ray.pairs.pack import microbatch
from dpo_ray.training.step import objective_of
from dpo_ray.types import ScoredPair, TokenizedPair

BETA = 0.2


def real_model(smollm2: Any) -> tuple[Any, list[ScoredPair]]:
    """SmolLM2, and pairs of words."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = with_token_scores(load_pretrained(str(smollm2), "float32", "packed").eval(), torch.device("cpu"))
    pairs = []
    for prompt, *answers in (("The sky is", " blue.", " made of green cheese."), ("Two and two are", " five", " four")):
        tokens = [np.array(tokenizer(text).input_ids, np.int32) for text in (prompt, *answers)]
        pairs.append(ScoredPair(TokenizedPair(prompt.encode()[:16], tokens[0], tuple(tokens[1:])), None))
    return model, pairs


@pytest.mark.parametrize("kind", ["tiny", pytest.param("real", marks=pytest.mark.shared)])
def test_gradient_of_dpo(kind: str, request: pytest.FixtureRequest) -> None:
    model, pairs = (tiny("llama"), make_pairs(4)) if kind == "tiny" else real_model(request.getfixturevalue("smollm2"))
    batch = microbatch(pairs)
    logps = answer_scores(model, batch).logps
    # A reference to which the policy has every other pair right and the others wrong, by twelve nats.
    reference = logps.detach() + 6 * torch.tensor([-1.0, 1.0, 1.0, -1.0]).repeat(len(pairs) // 2)
    stats = AnswerStats(logps, reference, batch.num_tokens, [2] * len(pairs))
    objective_of(ObjectiveConfig(beta=BETA)).loss(stats).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = {name: torch.zeros_like(gradient) for name, gradient in found.items()}
    rewards = (BETA * (logps.detach() - reference)).view(-1, 2).tolist()
    weights = [BETA / (1 + math.exp(chosen - rejected)) for chosen, rejected in rewards]
    assert max(weights) > 2 * min(weights)
    for scored, weight in zip(pairs, weights, strict=True):
        model.zero_grad()
        chosen, rejected = answer_scores(model, microbatch([scored])).logps
        (chosen - rejected).backward()
        for name, parameter in model.named_parameters():
            expected[name] -= weight * parameter.grad
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    # Thirty layers in float32 round more than two.
    tolerance = (1e-5 if kind == "tiny" else 2e-4) * scale
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=tolerance, msg=name)
