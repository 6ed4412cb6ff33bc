"""answer_scores against a computation written out for one answer at a time."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo_ray.errors import ConfigError
from dpo_ray.model.attention import PACKED, Pack, _by_block, _by_pair
from dpo_ray.model.forward import answer_scores, settle_layout, with_token_scores
from dpo_ray.pairs.pack import microbatch
from dpo_ray.types import ScoredPair, TokenizedPair

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61, "intermediate_size": 48}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 128}
GROUPED = {**SIZES, "num_key_value_heads": 2}
WINDOWED = {**GROUPED, "sliding_window": 7}
TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
# Windows are shorter than most of the pairs; the heads of the last five scale or bound scores or logits.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**GROUPED, "tie_word_embeddings": True},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "phi": GROUPED,
    "phi3": GROUPED,
    "gpt2": GPT2,
    "gpt_neox": SIZES,
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "mistral": WINDOWED,
    "gemma2": {**WINDOWED, "head_dim": 8, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.1},
    "gemma3_text": {**WINDOWED, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {**GROUPED, "logits_scaling": 3.0, "attention_multiplier": 0.7},
    "cohere": {**GROUPED, "logit_scale": 0.3},
}


def tiny(kind: str, attention: str = PACKED) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**TOKENS, **FAMILIES.get(kind, SIZES)})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than fresh weights: attention is then far from even, and a wrong mask far from right.
            parameter.mul_(4.0) if parameter.dim() > 1 else parameter.add_(0.1)
    return with_token_scores(model.eval())


def make_pairs(num: int) -> list[ScoredPair]:
    generator = torch.Generator().manual_seed(1)

    def tokens(low: int, high: int) -> torch.Tensor:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(0, 61, (length,), generator=generator, dtype=torch.int32).numpy()

    return [
        ScoredPair(TokenizedPair(bytes([i]) * 16, tokens(1, 20), (tokens(1, 12), tokens(1, 30))), None)
        for i in range(num)
    ]


def expected_logps(model: PreTrainedModel, pairs: list[ScoredPair]) -> torch.Tensor:
    """log_softmax of the model's own logits over one answer at a time, summed over its tokens: no batch, no padding."""
    model.set_attn_implementation("eager")
    found = []
    for scored in pairs:
        prompt = torch.tensor(scored.pair.prompt, dtype=torch.int64)
        for answer in scored.pair.answers:
            whole = torch.cat([prompt, torch.tensor(answer, dtype=torch.int64)])
            logps = model(whole[None]).logits[0].double().log_softmax(-1)
            found.append(sum(logps[t - 1, whole[t]] for t in range(len(prompt), len(whole))))
    model.set_attn_implementation(PACKED)
    return torch.stack(found)


@pytest.mark.parametrize("kind", FAMILIES)
def test_packed_equals_one_answer_at_a_time(kind: str) -> None:
    """Values and gradients of every parameter."""
    model, pairs = tiny(kind), make_pairs(4)
    settle_layout(model)
    assert model.packed
    weights = torch.arange(1.0, 9.0)
    expected = expected_logps(model, pairs)
    (expected * weights).sum().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    found = answer_scores(model, microbatch(pairs)).logps
    (found * weights).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5 * scale, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_plain_equals_packed(kind: str) -> None:
    model, pairs = tiny(kind), make_pairs(4)
    packed = answer_scores(model, microbatch(pairs)).logps
    model.packed = False
    model.set_attn_implementation("eager")
    torch.testing.assert_close(answer_scores(model, microbatch(pairs)).logps, packed, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_model_that_cannot_be_packed_is_laid_out_plainly(caplog: pytest.LogCaptureFixture) -> None:
    """A state-space layer carries what it has read from one pair into the next."""
    model, pairs = tiny("mamba"), make_pairs(3)
    settle_layout(model)
    assert not model.packed
    assert "MambaForCausalLM does not score packed pairs as it scores single answers" in caplog.text
    expected = expected_logps(model, pairs).float()
    torch.testing.assert_close(answer_scores(model, microbatch(pairs)).logps, expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_does_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("cohere")
    monkeypatch.delattr(model.config, "logit_scale")
    with pytest.raises(ConfigError, match="does more after its output layer than dpo_ray knows of"):
        settle_layout(model)


@pytest.mark.parametrize("window", [None, 7])
@torch.no_grad()
def test_block_mask_lets_see_what_pair_by_pair_attention_sees(window: int | None) -> None:
    """FlexAttention's eager path, which computes what its kernels compute on a GPU."""
    generator = torch.Generator().manual_seed(0)
    pack = Pack([[5, 7, 3], [1, 12, 6], [40, 2, 70]], torch.device("cpu"))
    num_tokens = pack.position_ids.shape[1]
    query = torch.randn(1, 4, num_tokens, 8, generator=generator)
    key, value = torch.randn(2, 1, 2, num_tokens, 8, generator=generator)
    for softcap in (None, 0.5):
        by_pair = _by_pair(query, key, value, pack, 0.4, window, softcap)
        torch.testing.assert_close(_by_block(query, key, value, pack, 0.4, window, softcap), by_pair)


@torch.no_grad()
def test_company_does_not_matter() -> None:
    model, pairs = tiny("llama"), make_pairs(5)
    together = answer_scores(model, microbatch(pairs)).logps
    alone = torch.cat([answer_scores(model, microbatch([pair])).logps for pair in pairs])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
