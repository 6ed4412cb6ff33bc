"""Where a model's files are: on this machine, or fetched once per node; its tokenizer and what its configuration says.

Tasks that only tokenize import this and not the models, which take seconds to import.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from dpo_ray import storage
from dpo_ray.errors import ConfigError, first_line
from dpo_ray.extensions import check_installed

# Files of a model fetched at the same time.
DOWNLOADS = 8
# How mixtures of experts say how many they have, and how much the loss counts that balances them.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_AUXILIARY_LOSS = ("router_aux_loss_coef", "aux_loss_alpha", "moe_aux_loss_coeff")
_TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece")


def localize(uri: str, weights: bool = True) -> str:
    """A local folder with the files of a model; of a remote one they are copied once per node and content.

    Args:
        uri: transformers directory.
        weights: Whether the weights are needed too.

    Raises:
        ConfigError: There is no model at this place.
    """
    if weights and not storage.exists(storage.join(uri, "config.json")):
        raise _no_config(uri)
    if storage.is_local(uri):
        return storage.filesystem(uri)[1]
    files = [*(weight_files(uri) if weights else []), *_small_files(uri)]
    content = hashlib.sha256(repr(_identities(uri, files)).encode()).hexdigest()[:24]
    cache = os.environ.get("DPO_RAY_CACHE") or os.path.join(tempfile.gettempdir(), f"dpo_ray-{os.getuid()}")
    folder = os.path.join(cache, "models", content)
    if _missing(folder, files):
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, ".lock"), "w") as lock, ThreadPoolExecutor(DOWNLOADS) as pool:
            # Of the processes of a node one fetches, the others wait.
            fcntl.flock(lock, fcntl.LOCK_EX)
            wanted = _missing(folder, files)
            list(pool.map(lambda name: storage.download(storage.join(uri, name), os.path.join(folder, name)), wanted))
    return folder


def _missing(folder: str, files: list[str]) -> list[str]:
    return [name for name in files if not os.path.exists(os.path.join(folder, name))]


def load_tokenizer(uri: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Raises:
        ConfigError: There is none.
    """
    if not _small_files(uri):
        raise ConfigError(f"{uri}: no tokenizer there; model.path and model.tokenizer are transformers directories")
    try:
        return AutoTokenizer.from_pretrained(localize(uri, weights=False))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{uri}: cannot load a tokenizer: {first_line(error)}; set model.tokenizer") from None


def vocabulary_size(uri: str) -> int:
    """Rows of a model's embedding."""
    return int(model_config(uri).get_text_config().vocab_size)


def relative_costs(uri: str) -> tuple[float, float]:
    """What the output layer and attention cost, against all other matrix products for one token.

    Counted from the shape of a dense Transformer with a gated feed-forward part; good enough to balance work by.

    Returns:
        For one token's way through the output layer, and for one token's look at another; zeros for a model of
        another kind.
    """
    config = model_config(uri).get_text_config()
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, getattr(config, "num_attention_heads", None)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    if not isinstance(heads, int) or not isinstance(inner, int):
        return 0.0, 0.0
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    body = layers * hidden * (2 * head_dim * (heads + key_heads) + 3 * inner)
    return config.vocab_size * hidden / body, 2 * layers * heads * head_dim / body


def check_vocabulary(uri: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer whose ids the model's embedding does not have.

    Raises:
        ConfigError: The vocabulary is larger than the embedding.
    """
    size = vocabulary_size(uri)
    if len(tokenizer) > size:
        raise ConfigError(
            f"{uri}: the tokenizer has {len(tokenizer)} tokens, the model's embedding {size} rows; "
            "model.tokenizer must be the one that the model was trained with"
        )


def check_trainable(uri: str) -> None:
    """Refuses what is no causal language model, and what is meant to be trained with a loss that would be left out.

    Raises:
        ConfigError: It is one of these.
    """
    whole = model_config(uri)
    names = whole.architectures or []
    if names and not any(name.endswith(_GENERATES) for name in names) or whole.is_encoder_decoder:
        raise ConfigError(
            f"{uri}: {', '.join(names) or whole.model_type} is no causal language model; model.path wants one, whose "
            "config.json says architectures: [...ForCausalLM]"
        )
    config = whole.get_text_config()
    experts = _num_experts(config)
    for name in _AUXILIARY_LOSS:
        if experts > 1 and getattr(config, name, None):
            raise ConfigError(
                f"{uri}: {config.model_type} is a mixture of {experts} experts whose router has a loss of its own "
                f"({name}: {getattr(config, name):g}), which dpo_ray does not compute; to train without it, set "
                f"{name}: 0 in the model's config.json"
            )


def _num_experts(config: PretrainedConfig) -> int:
    return max(getattr(config, name, None) or 0 for name in _EXPERTS)


def model_config(uri: str) -> PretrainedConfig:
    """A model's configuration, dropout off.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """
    if not storage.exists(storage.join(uri, "config.json")):
        raise _no_config(uri)
    try:
        config = AutoConfig.from_pretrained(localize(uri, weights=False))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{uri}: cannot read the model's config.json: {first_line(error)}") from None
    for name, value in vars(config).items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def check_quantize(quantize: str | None, uri: str) -> None:
    """Refuses to quantize weights that cannot be.

    Args:
        quantize: How; None: not at all.
        uri: transformers directory.

    Raises:
        ConfigError: bitsandbytes is not installed, or leaves nearly all of the model as it is.
    """
    if quantize is None:
        return
    check_installed("bitsandbytes", "bitsandbytes", f"adapter.quantize is {quantize}")
    config = model_config(uri).get_text_config()
    if (experts := _num_experts(config)) > 1:
        raise ConfigError(
            f"{uri}: adapter.quantize is {quantize}, but {config.model_type} is a mixture of {experts} experts, whose "
            "weights bitsandbytes leaves as they are: leave it out"
        )


def _no_config(uri: str) -> ConfigError:
    hint = ""
    hub = os.path.relpath(uri) if storage.is_local(uri) else ""
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", hub) and not os.path.exists(os.path.dirname(uri)):
        hint = f"; if {hub} is a model of the Hugging Face Hub: `hf download {hub} --local-dir models/{hub}`"
    return ConfigError(f"{uri}: no config.json there; model.path is a transformers directory (local or s3://){hint}")


def _small_files(uri: str) -> list[str]:
    """All but the weights."""
    names = storage.list_names(uri)
    return [name for name in names if name.endswith(".json") or name.startswith(_TOKENIZER_FILES)]


def weight_files(uri: str) -> list[str]:
    """Names of the files that hold a model's weights.

    Raises:
        ConfigError: There are none.
    """
    weights = sorted(name for name in storage.list_names(uri) if name.endswith(".safetensors"))
    if not weights:
        raise ConfigError(f"{uri}: no .safetensors file there; other weight formats can execute code and are not read")
    return weights


def _identities(uri: str, files: list[str]) -> list[tuple[str, str]]:
    return [(name, storage.identity(storage.join(uri, name))) for name in files]
