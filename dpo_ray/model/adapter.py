"""LoRA: small matrices beside frozen weights, which alone are trained. peft's layers, put into a model as it is."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from dpo_ray.config import AdapterConfig
from dpo_ray.errors import ConfigError, first_line

_OWN = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.")
# What peft calls an adapter that has no other name; its files leave it out.
_NAME = ".default."
_WHERE = "names of its layers, as [q_proj, v_proj], a regular expression for whole names, or all-linear"


def add_adapter(model: PreTrainedModel, config: AdapterConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Freezes a model and puts an adapter into it, whose weights have no values yet.

    Args:
        model: Of any device; it stays of its class.
        config: With a rank.
        dtype: Of the adapter.
        device: Of the adapter.

    Raises:
        ConfigError: `adapter.target_modules` names what is not there, or what can have no adapter.
    """
    assert config.rank is not None, "no adapter is wanted"
    alpha: Any = config.alpha  # peft says int, and takes any number.
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=alpha,
        target_modules=config.target_modules,
        use_rslora=config.rslora,
        use_dora=config.dora,
    )
    said = f"adapter.target_modules is {config.target_modules!r}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of tied layers, which are refused below.
            inject_adapter_in_model(lora, model, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ConfigError(f"{said}: {first_line(error)} Write {_WHERE}") from None
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if isinstance(config.target_modules, list):
        for wanted in config.target_modules:
            if not any(name == wanted or name.endswith("." + wanted) for name in layers):
                raise ConfigError(f"{said}, but {type(model).__name__} has no layer {wanted}: write {_WHERE}")
    for name, layer in layers.items():
        if layer is model.get_input_embeddings() or layer.lora_embedding_A:
            raise ConfigError(
                f"{said}, but {name} is an embedding, and only linear layers get an adapter: leave it out"
            )
        if layer is model.get_output_embeddings() and layer.weight is model.get_input_embeddings().weight:
            raise ConfigError(
                f"{said}, but {name} is tied to the embedding, which would not change with it: leave it out"
            )
    for name, parameter in list(model.named_parameters()):
        if is_adapters(name):
            owner, _, own_name = name.rpartition(".")
            trained = nn.Parameter(torch.empty_like(parameter, dtype=dtype, device=device))
            setattr(model.get_submodule(owner), own_name, trained)


def is_adapters(name: str) -> bool:
    """Whether a parameter is the adapter's, by its name."""
    return any(own in name for own in _OWN)


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether a parameter holds quantized weights."""
    return not parameter.is_floating_point()


def num_weights(parameter: torch.Tensor) -> int:
    """How many weights a parameter holds, two to a byte where it is quantized."""
    return parameter.numel() * (2 if is_quantized(parameter) else 1)


def name_in_files(name: str) -> str:
    """What the files of a model without an adapter call a parameter of one that has it."""
    return name.replace(".base_layer.", ".")


def start_adapter(model: nn.Module, seed: int) -> None:
    """Gives the adapter of a sharded model its first values, with which it changes nothing.

    As peft does: the first matrix uniform, the second zero, DoRA's magnitudes the norms of the weights beside it; the
    same whatever the number of ranks.

    Args:
        model: Sharded, with storage.
        seed: Of the run.
    """
    for name, parameter in model.named_parameters():
        if is_adapters(name):
            assert isinstance(parameter, DTensor), f"{name} is not sharded"
            whole = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                # By name: the same for a layer whatever other layers have one.
                digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
                nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
            elif ".lora_magnitude_vector." in name:
                layer = model.get_submodule(name.partition(".lora_magnitude_vector.")[0])
                whole = _norms(cast(LoraLayer, layer))
            # Each rank has computed the whole: nobody sends.
            part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            with torch.no_grad():
                parameter.to_local().copy_(part.to_local())


def _norms(layer: LoraLayer) -> torch.Tensor:
    """Of the weights that lead to each output, in the dtype in which the forward pass compares with them."""
    weight = dequantize_module_weight(layer.get_base_layer()).detach()
    norms = torch.linalg.norm(weight, dim=0 if cast(Any, layer).fan_in_fan_out else 1)
    return norms.full_tensor() if isinstance(norms, DTensor) else norms


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapter, for inference: what it was at its start."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    # Not peft's `enable_adapters`: it changes requires_grad too, which FSDP has taken note of.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def save_adapter(folder: str, model: nn.Module, base: str, state: Mapping[str, torch.Tensor]) -> None:
    """Writes the files that peft reads.

    Args:
        folder: Of this machine.
        model: The one that has the adapter.
        base: Where the model without it is.
        state: Whole tensors, by their names in the model; those of the adapter among them are written.
    """
    lora = cast(Any, model).peft_config["default"]
    described = {**lora.to_dict(), "base_model_name_or_path": base, "inference_mode": True}
    with open(os.path.join(folder, "adapter_config.json"), "w", encoding="utf-8") as file:
        json.dump(described, file, indent=2, sort_keys=True, default=sorted)
    # Else also the other name of a tied weight, which is frozen under its first name.
    own = {name: tensor.contiguous() for name, tensor in state.items() if is_adapters(name)}
    named = {f"base_model.model.{name.replace(_NAME, '.')}": tensor for name, tensor in own.items()}
    save_file(named, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})


def merged(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """A model on the CPU with the adapter of a folder merged into its weights."""
    return PeftModel.from_pretrained(model, folder).merge_and_unload()
