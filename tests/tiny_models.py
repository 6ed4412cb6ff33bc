"""Tiny random models of many families, and pairs of random tokens for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo_ray.model.attention import PACKED
from dpo_ray.model.forward import with_token_scores
from dpo_ray.types import ScoredPair, TokenizedPair

# Heads of 16: FlexAttention's kernels take no smaller ones.
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61, "intermediate_size": 48}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 128}
GROUPED = {**SIZES, "num_key_value_heads": 2}
WINDOWED = {**GROUPED, "sliding_window": 7}
TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
# Windows are shorter than most of the pairs; the heads of the last five scale or bound scores or logits.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**GROUPED, "tie_word_embeddings": True},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 24},
    "phi": GROUPED,
    "phi3": GROUPED,
    "gpt2": GPT2,
    "gpt_neox": SIZES,
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "mistral": WINDOWED,
    "gemma2": {**WINDOWED, "head_dim": 16, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.1},
    "gemma3_text": {**WINDOWED, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
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
    return with_token_scores(model.eval(), torch.device("cpu"))


def make_pairs(num: int) -> list[ScoredPair]:
    generator = torch.Generator().manual_seed(1)

    def tokens(low: int, high: int) -> torch.Tensor:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(0, 61, (length,), generator=generator, dtype=torch.int32).numpy()

    return [
        ScoredPair(TokenizedPair(bytes([i]) * 16, tokens(1, 20), (tokens(1, 12), tokens(1, 30))), None)
        for i in range(num)
    ]
