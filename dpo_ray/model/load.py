"""Models from local folders and object storage: safetensors only, no remote code."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from dpo_ray.errors import ConfigError, first_line
from dpo_ray.model.attention import PACKED
from dpo_ray.model.files import check_quantize, localize, model_config

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_pretrained(uri: str, dtype: str, attention: str) -> PreTrainedModel:
    """A whole model on the CPU, dropout off.

    Args:
        uri: transformers directory.
        dtype: "float32" or "bfloat16".
        attention: "packed", or transformers' attention implementation.

    Raises:
        ConfigError: The folder holds no causal language model in safetensors.
    """
    return _from_pretrained(uri, dtype, attention)


def load_quantized(uri: str, dtype: str, attention: str, quantize: str, device: torch.device) -> PreTrainedModel:
    """A whole model whose linear layers, but for the output layer, hold weights in 4 bits, dropout off.

    Quantized one by one on the device, and their scales again, as QLoRA does it (arXiv:2305.14314, section 3).

    Args:
        uri: transformers directory.
        dtype: "float32" or "bfloat16": of the other weights, and of the products.
        attention: "packed", or transformers' attention implementation.
        quantize: "nf4".
        device: Where the weights will be.

    Raises:
        ConfigError: The folder holds no causal language model in safetensors, or none that can be quantized here.
    """
    check_quantize(quantize, uri)
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )
    model = _from_pretrained(uri, dtype, attention, quantization_config=how, device_map={"": device})
    # In eval mode bitsandbytes packs weights for CPUs with bfloat16 products, through which no gradient comes.
    return model.train()


def _from_pretrained(uri: str, dtype: str, attention: str, **options: Any) -> PreTrainedModel:
    folder = localize(uri)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=model_config(uri),
            dtype=DTYPES[dtype],
            attn_implementation=None if attention == PACKED else attention,
            use_safetensors=True,
            **options,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{uri}: cannot load a causal language model: {first_line(error)}") from None
    return _with_attention(without_dropout(model), attention)


def empty_model(uri: str, dtype: str, attention: str) -> PreTrainedModel:
    """The model's structure with parameters on the meta device and real buffers, dropout off.

    Buffers have the dtypes that they have in a loaded model: rotary frequencies stay in float32.
    """
    config = model_config(uri)
    # Buffers such as rotary frequencies are computed, not stored: on the meta device they would be lost.
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=DTYPES[dtype], attn_implementation=None if attention == PACKED else attention
            )
    except ValueError as error:
        raise ConfigError(f"{uri}: cannot make a causal language model: {first_line(error)}") from None
    model.tie_weights()
    return _with_attention(without_dropout(model), attention)


def _with_attention(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    if attention == PACKED:
        # Chunks of attention are in transformers' masks alone, which packs do not use.
        chunked = "chunked_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or [])
        if model._can_set_attn_implementation() and not chunked:
            model.set_attn_implementation(PACKED)
        else:
            log.warning(
                "%s has an attention of its own: pairs cannot be packed; each answer gets a row, with padding",
                type(model).__name__,
            )
    return model


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Turns dropout off in train mode too: policy and reference must be the same function at the start."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model
