"""answer_logps against a computation written out for one answer at a time."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo_ray.model.forward import answer_logps
from dpo_ray.pairs.pack import microbatch
from dpo_ray.types import ScoredPair, TokenizedPair

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61, "intermediate_size": 48}


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 128} if kind == "gpt2" else SIZES
    extra = {"num_key_value_heads": 2} if kind in ("llama", "qwen2", "mistral", "gemma2") else {}
    extra |= {"head_dim": 8} if kind == "gemma2" else {}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **sizes, **extra), attn_implementation="eager"
    ).eval()


def make_pairs(num: int) -> list[ScoredPair]:
    generator = torch.Generator().manual_seed(1)

    def tokens(low: int, high: int) -> torch.Tensor:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(0, 61, (length,), generator=generator, dtype=torch.int32).numpy()

    return [
        ScoredPair(TokenizedPair(bytes([i]) * 16, tokens(1, 20), (tokens(1, 12), tokens(1, 30))), None)
        for i in range(num)
    ]


def expected_logps(model: PreTrainedModel, pairs: list[ScoredPair]) -> list[float]:
    """log_softmax over the whole sequence of one answer, summed over its tokens: no batch, no padding."""
    found = []
    for scored in pairs:
        prompt = torch.tensor(scored.pair.prompt, dtype=torch.int64)
        for answer in scored.pair.answers:
            whole = torch.cat([prompt, torch.tensor(answer, dtype=torch.int64)])
            logps = model(whole[None]).logits[0].double().log_softmax(-1)
            found.append(sum(float(logps[t - 1, whole[t]]) for t in range(len(prompt), len(whole))))
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma2", "gpt2", "phi"])
@torch.no_grad()
def test_equals_one_answer_at_a_time(kind: str) -> None:
    model, pairs = tiny(kind), make_pairs(4)
    found = answer_logps(model, microbatch(pairs))
    assert found.tolist() == pytest.approx(expected_logps(model, pairs), rel=1e-5)


@torch.no_grad()
def test_company_does_not_matter() -> None:
    model, pairs = tiny("llama"), make_pairs(5)
    together = answer_logps(model, microbatch(pairs))
    alone = torch.cat([answer_logps(model, microbatch([pair])) for pair in pairs])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_gradient_equals_one_answer_at_a_time() -> None:
    model, pairs = tiny("llama"), make_pairs(3)
    weights = torch.arange(1.0, 7.0)
    (answer_logps(model, microbatch(pairs)) * weights).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for index, pair in enumerate(pairs):
        (answer_logps(model, microbatch([pair])) * weights[2 * index : 2 * index + 2]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)
