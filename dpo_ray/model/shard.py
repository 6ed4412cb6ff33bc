"""FSDP2: the sole owner of sharding. The same code shards over GPUs and, with gloo, over CPU processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dpo_ray.config import ModelConfig
from dpo_ray.model.load import DTYPES, empty_model, load_pretrained


def sharded_policy(config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """The policy at its start, every parameter a DTensor sharded over all ranks.

    Rank 0 reads the weights; the others begin on the meta device and never hold a whole model.

    Args:
        config: Where the weights are, and their dtypes: those of the sharded (trained) weights and of forward and
            backward; gradients are reduced in float32.
        device: This rank's device.

    Collective: all ranks.
    """
    model = empty_model(config.path, config.weights_dtype, config.attention)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shard(model, config.compute_dtype, device.type)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    whole = {}
    if dist.get_rank() == 0:
        whole = load_pretrained(config.path, config.weights_dtype, config.attention).state_dict()
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model.train()


def shard(model: PreTrainedModel, compute_dtype: str, device_type: str) -> None:
    """Shards each transformer block, then the rest, over all ranks.

    Gradients are summed over ranks, not averaged: the loss is divided by the global batch's number of pairs already.
    """
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[compute_dtype], reduce_dtype=torch.float32)
    is_block = fsdp2_prepare_auto_wrap_policy(
        FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap"), model
    )
    blocks = [module for module in model.modules() if is_block is not None and is_block(module)]
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        assert isinstance(module, FSDPModule)
        # A plain sum on every backend; gloo has no scaled reduction.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is not sharded"
        assert all(placement.is_shard() for placement in parameter.placements), f"{name} is {parameter.placements}"


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """Whether the next backward pass reduces gradients over ranks."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(sync)


def clip_grad_norm(model: nn.Module, max_norm: float | None) -> torch.Tensor:
    """Clips the global gradient norm in place.

    Args:
        model: A sharded model with gradients.
        max_norm: Upper bound; None measures only.

    Returns:
        The norm before clipping, a scalar.

    Collective: all ranks.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def gathered_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state on rank 0, on the CPU; empty on the other ranks.

    Collective: all ranks.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
