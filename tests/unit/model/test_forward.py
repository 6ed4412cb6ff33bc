"""answer_scores against a computation written out for one answer at a time."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny_models import FAMILIES, make_pairs, tiny
from transformers import PreTrainedModel

from dpo_ray.errors import ConfigError
from dpo_ray.model.attention import PACKED, Pack, _by_block, _by_pair
from dpo_ray.model.forward import answer_scores, settle_layout
from dpo_ray.pairs.pack import microbatch
from dpo_ray.types import ScoredPair


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


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_adapters_on_the_output_layer(kind: str) -> None:
    """peft's LoRA, beside embeddings that are tied (llama) and under a soft cap (gemma2)."""
    adapter = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model, pairs = inject_adapter_in_model(adapter, tiny(kind)), make_pairs(4)
    expected = expected_logps(model, pairs)
    expected.sum().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    found = answer_scores(model, microbatch(pairs)).logps
    found.sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert any("lm_head" in name for name in wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-4, msg=name)


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


def test_a_head_that_does_more_is_refused() -> None:
    model = tiny("cohere")
    model.logit_scale = 30.0  # Unlike its configuration's.
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


def test_short_attention_in_float32_long_in_bfloat16() -> None:
    """In a pack that has both; what bfloat16 rounds is 2^-9 of values of about 1."""
    generator = torch.Generator().manual_seed(0)
    pack = Pack([[5, 7, 3], [200, 12, 90], [1, 270, 6]], torch.device("cpu"))
    num_tokens = pack.position_ids.shape[1]
    states = [torch.randn(1, heads, num_tokens, 8, generator=generator).bfloat16() for heads in (4, 2, 2)]
    weights = torch.randn(1, 4, num_tokens, 8, generator=generator)
    narrow, exact = (
        [each.detach().to(dtype, copy=True).requires_grad_() for each in states]
        for dtype in (torch.bfloat16, torch.float64)
    )
    found = _by_pair(*narrow, pack, None, None, None, longest_wide=256)
    expected = _by_pair(*exact, pack, None, None, None)
    assert found.dtype == torch.bfloat16
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02)
    for mine, other in zip(narrow, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=0.02, atol=0.03)


@torch.no_grad()
def test_company_does_not_matter() -> None:
    model, pairs = tiny("llama"), make_pairs(5)
    together = answer_scores(model, microbatch(pairs)).logps
    alone = torch.cat([answer_scores(model, microbatch([pair])).logps for pair in pairs])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
