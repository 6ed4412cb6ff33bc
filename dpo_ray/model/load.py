"""Models and tokenizers from local folders and object storage: safetensors only, no remote code."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpo_ray import storage
from dpo_ray.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece")


def localize(uri: str) -> str:
    """A local folder with the files of a model; a remote one is copied once per node and content.

    Raises:
        ConfigError: There is no model at this place.
    """
    if not storage.exists(storage.join(uri, "config.json")):
        raise ConfigError(f"{uri}: no config.json there; model.path is a transformers directory (local or s3://)")
    if storage.is_local(uri):
        return storage.filesystem(uri)[1]
    files = _model_files(uri)
    content = hashlib.sha256(repr(_identities(uri, files)).encode()).hexdigest()[:24]
    cache = os.environ.get("DPO_RAY_CACHE") or os.path.join(tempfile.gettempdir(), f"dpo_ray-{os.getuid()}")
    folder = os.path.join(cache, "models", content)
    for name in files:
        if not os.path.exists(os.path.join(folder, name)):
            storage.download(storage.join(uri, name), os.path.join(folder, name))
    return folder


def load_tokenizer(uri: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Raises:
        ConfigError: There is none.
    """
    try:
        return AutoTokenizer.from_pretrained(localize(uri))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{uri}: cannot load a tokenizer: {_first_line(error)}; set model.tokenizer") from None


def load_pretrained(uri: str, dtype: str, attention: str) -> PreTrainedModel:
    """A whole model on the CPU, dropout off.

    Args:
        uri: transformers directory.
        dtype: "float32" or "bfloat16".
        attention: transformers' attention implementation.

    Raises:
        ConfigError: The folder holds no causal language model in safetensors.
    """
    folder = localize(uri)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=_config(folder),
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{uri}: cannot load a causal language model: {_first_line(error)}") from None
    return without_dropout(model)


def empty_model(uri: str, attention: str) -> PreTrainedModel:
    """The model's structure with float32 parameters on the meta device and real buffers, dropout off."""
    config = _config(localize(uri))
    # Buffers such as rotary frequencies are computed, not stored: on the meta device they would be lost.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    model.tie_weights()
    return without_dropout(model)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Turns dropout off in train mode too: policy and reference must be the same function at the start."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def weights_digest(uri: str, cache_uri: str) -> str:
    """Digest of a model's content: its configuration and weights, wherever they lie.

    Args:
        uri: transformers directory.
        cache_uri: Folder that remembers digests by what changes when the files do.
    """
    files = [name for name in _model_files(uri) if name == "config.json" or name.endswith(".safetensors")]
    known = storage.join(cache_uri, hashlib.sha256(repr([uri, _identities(uri, files)]).encode()).hexdigest()[:32])
    if storage.exists(known):
        return str(storage.read_json(known)["digest"])
    folder = Path(localize(uri))
    parts = [f"{name}:{storage.sha256_of_file(str(folder / name))}" for name in files]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    storage.write_json(known, {"uri": uri, "digest": digest})
    return digest


def check_vocabulary(uri: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer whose ids the model's embedding does not have.

    Raises:
        ConfigError: The vocabulary is larger than the embedding.
    """
    size = _config(localize(uri)).get_text_config().vocab_size
    if len(tokenizer) > size:
        raise ConfigError(
            f"{uri}: the tokenizer has {len(tokenizer)} tokens, the model's embedding {size} rows; "
            "model.tokenizer must be the one that the model was trained with"
        )


def _config(folder: str) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}: cannot read the model's config.json: {_first_line(error)}") from None
    for name, value in vars(config).items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def _model_files(uri: str) -> list[str]:
    names = storage.list_names(uri)
    wanted = [name for name in names if name.endswith((".safetensors", ".json")) or name.startswith(_TOKENIZER_FILES)]
    if not any(name.endswith(".safetensors") for name in wanted):
        raise ConfigError(f"{uri}: no .safetensors file there; other weight formats can execute code and are not read")
    return wanted


def _identities(uri: str, files: list[str]) -> list[tuple[str, str]]:
    return [(name, storage.identity(storage.join(uri, name))) for name in files]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
