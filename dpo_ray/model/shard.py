"""FSDP2: the sole owner of sharding. The same code shards over GPUs and, with gloo, over CPU processes."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AttentionInterface, PreTrainedModel

from dpo_ray.config import AdapterConfig, ModelConfig
from dpo_ray.errors import ConfigError
from dpo_ray.model.adapter import add_adapter, is_adapters, is_quantized, name_in_files, start_adapter
from dpo_ray.model.attention import PACKED, packed_attention
from dpo_ray.model.clock import BlockClock
from dpo_ray.model.forward import settle_layout, with_token_scores
from dpo_ray.model.load import DTYPES, empty_model, load_pretrained, load_quantized
from dpo_ray.model.malloc import keep_freed_memory, return_freed_memory
from dpo_ray.model.weights import as_named, fill, stored_tensors


def sharded_policy(
    config: ModelConfig,
    device: torch.device,
    adapter: AdapterConfig | None = None,
    seed: int = 0,
    group: int | None = None,
) -> PreTrainedModel:
    """The policy at its start, every parameter a DTensor sharded over ranks; but quantized ones are whole on each.

    Args:
        config: Where the weights are, and their dtypes: those of the sharded (trained) weights and of forward and
            backward; gradients are reduced in float32.
        device: This rank's device.
        adapter: With a rank: the weights are frozen, quantized where it says so, and an adapter beside them is trained.
        seed: Decides the adapter's start.
        group: See `shard`.

    Raises:
        ConfigError: The model cannot be read, or cannot have this adapter.

    Collective: all ranks.
    """
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP, where one rank is alone.
    quantized = None
    if adapter is not None and adapter.quantize:
        quantized = load_quantized(config.path, config.compute_dtype, config.attention, adapter.quantize, device)
    model = empty_policy(config, adapter, quantized)
    shard(model, config.compute_dtype, device, config.cpu_offload, group)
    model.saves_on_host = config.gradient_checkpointing == "offload"
    if config.compile:
        compile_blocks(model)
    if adapter is None or not adapter.quantize:
        _read_weights(model, config.path, device, torch.device("cpu") if config.cpu_offload else device)
    start_adapter(model, seed)
    settle_layout(model)
    release_gathered(model)
    _assert_sharded(model)
    keep_freed_memory()
    return model.train()


def empty_policy(
    config: ModelConfig, adapter: AdapterConfig | None, quantized: PreTrainedModel | None = None
) -> PreTrainedModel:
    """The policy as it will be trained, whole, its parameters on the meta device.

    Args:
        config: See `sharded_policy`.
        adapter: See `sharded_policy`.
        quantized: The model below the adapter, where its weights are in 4 bits: they stay as they are.

    Raises:
        ConfigError: There is no such model, or it cannot have this adapter.
    """
    if adapter is None or adapter.rank is None:
        model = empty_model(config.path, config.weights_dtype, config.attention)
    else:
        # Frozen weights are never updated, and those of the reference: without the adapter it is the same function.
        model = quantized or empty_model(config.path, config.compute_dtype, config.attention)
        # Beside weights that are there it is there too: FSDP wants all of a block on one device.
        add_adapter(model, adapter, DTYPES[config.weights_dtype], model.device)
    freeze(model, config.freeze)
    if config.gradient_checkpointing:
        # Only reentrant checkpoints keep a block's input as a saved tensor, which can be kept elsewhere.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # In evaluation they have not.
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated")  # Its new name is too new.
        reentrant = config.gradient_checkpointing == "offload"
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant and not all(parameter.requires_grad for parameter in model.parameters()):
            # They give no gradient where their input has none, as it has not behind a frozen embedding.
            model.enable_input_require_grads()
    return model


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Has weights stay as they are.

    Args:
        model: Not sharded yet.
        patterns: Regular expressions: a weight is frozen where one of them occurs in its name.

    Raises:
        ConfigError: One occurs in no name, or all weights would be frozen.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ConfigError(
                f"model.freeze: {pattern!r} occurs in no name of a weight of {type(model).__name__}; the first are "
                f"{', '.join(names[:8])}"
            )
    for name, parameter in model.named_parameters():
        if any(re.search(pattern, name) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"model.freeze is {list(patterns)}: that is every weight, and nothing is left to train")


def sharded_reference(uri: str, dtype: str, attention: str, device: torch.device) -> PreTrainedModel:
    """A model for inference alone, every parameter a DTensor sharded over all ranks.

    Args:
        uri: transformers directory.
        dtype: Of weights and computation.
        attention: "packed", or transformers' attention implementation.
        device: This rank's device.

    Collective: all ranks.
    """
    return_freed_memory()
    model = empty_model(uri, dtype, attention)
    shard(model, dtype, device)
    _read_weights(model, uri, device, device)
    settle_layout(model)
    release_gathered(model)
    return model.eval().requires_grad_(False)


def alone() -> bool:
    """Whether there is no other rank, to whom DCP would send its plan.

    gloo's threads would copy it with OpenMP, which then has more threads than cores, and from then on lets them sleep
    between operations: on two cores a step took a third longer.
    """
    return dist.get_world_size() == 1


def release_gathered(model: nn.Module) -> None:
    """Frees the weights that the root keeps gathered after a forward pass, for a backward pass that does not come."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _read_weights(model: PreTrainedModel, uri: str, device: torch.device, kept_on: torch.device) -> None:
    """Gives a sharded model on the meta device its weights: each rank reads its own slices.

    Where a model's files name the weights otherwise than the model does, rank 0 has transformers read and rename them,
    and the others get theirs from it.

    Args:
        model: Parameters on the meta device, real buffers. An adapter's get storage alone.
        uri: transformers directory.
        device: Where it computes.
        kept_on: Where the shards stay.

    Raises:
        ConfigError: The files cannot be read.

    Collective: all ranks.
    """
    buffers = dict(model.named_buffers())
    model.to_empty(device=kept_on)
    for name, buffer in buffers.items():
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, buffer.to(device))
    names = {name: name_in_files(name) for name in model.state_dict() if not is_adapters(name)}
    tensors: dict[str, torch.Tensor] = {
        names[name]: parameter for name, parameter in model.named_parameters() if name in names
    }
    tensors |= {names[name]: buffer for name, buffer in model.named_buffers() if name in names}
    name_of = {id(tensor): name for name, tensor in tensors.items()}
    everything = [
        (names[name], tensor) for name, tensor in model.named_parameters(remove_duplicate=False) if name in names
    ]
    aliases = {name: name_of[id(tensor)] for name, tensor in everything if name_of[id(tensor)] != name}
    stored = as_named(
        uri, stored_tensors(uri), {name: tuple(tensor.shape) for name, tensor in tensors.items()}, aliases
    )
    # Of a folder on each node's own disk one may differ: all go the same way.
    agreed = torch.tensor(int(stored is not None), device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    if agreed and stored is not None:
        with torch.no_grad():
            fill((stored[name], *_own_rows(tensor)) for name, tensor in tensors.items())
        return
    whole = {}
    if dist.get_rank() == 0:
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        found = load_pretrained(uri, dtype, "eager").state_dict()
        whole = {name: found[named] for name, named in names.items()}
        # They are started afterwards.
        whole |= {
            name: torch.zeros(p.shape, dtype=p.dtype) for name, p in model.named_parameters() if is_adapters(name)
        }
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def _own_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's rows of a tensor, and the number of the first."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    assert all(placement.is_shard(0) or placement.is_replicate() for placement in tensor.placements), "split by rows"
    _, first = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), first[0] if first else 0


def shard(
    model: PreTrainedModel,
    compute_dtype: str,
    device: torch.device,
    cpu_offload: bool = False,
    group: int | None = None,
) -> None:
    """Shards each transformer block, then the rest, over all ranks, or over those of each group of them.

    Gradients are summed over ranks, not averaged: the loss is divided by the global batch's number of pairs already.

    Args:
        model: A whole model.
        compute_dtype: Of forward and backward passes.
        device: Where they run.
        cpu_offload: Whether the shards stay in the host's memory.
        group: So many ranks, one after the other, share a copy of the weights, and each further group of as many has
            one of its own; None: all ranks share one.

    Collective: all ranks.
    """
    mesh = _mesh(device, group or dist.get_world_size())
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[compute_dtype], reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    quantized = {parameter for parameter in model.parameters() if is_quantized(parameter)}
    sharded: list[FSDPModule] = []
    for module in [*blocks_of(model), model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload, ignored_params=quantized)
        assert isinstance(module, FSDPModule)
        sharded.append(module)
        if mesh.size() > 1:
            # A plain sum on every backend; gloo has no scaled reduction. One rank would divide by 1, at a cost.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
        else:
            module.set_custom_reduce_scatter(_InPlace())
    for block, following in itertools.pairwise(sharded[:-1]):
        # The next weights are on their way while this block computes; in backward FSDP does so by itself.
        block.set_modules_to_forward_prefetch([following])
    register_fsdp_forward_method(with_token_scores(model, device), "token_scores")
    # Blocks are alike: the one in the middle stands for all.
    model.clock = BlockClock(cast(nn.Module, sharded[(len(sharded) - 1) // 2]), device)
    _assert_sharded(model)


def _mesh(device: torch.device, group: int) -> DeviceMesh:
    """All ranks; or groups, which replicate, of ranks, which shard."""
    ranks = torch.arange(dist.get_world_size()).view(-1, group)
    if len(ranks) == 1:
        return init_device_mesh(device.type, (group,))
    world = dist.group.WORLD
    assert world is not None
    # The mesh's own groups would have PyTorch's timeout, and give up a rank that waits out an outage.
    timeout = world._get_backend(device).options._timeout
    groups = [dist.new_subgroups_by_enumeration(each.tolist(), timeout)[0] for each in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("replicate", "shard"))


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks, each of which is gathered by itself; the rest is gathered with the model."""
    is_block = fsdp2_prepare_auto_wrap_policy(
        FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap"), model
    )
    return [module for module in model.modules() if is_block is not None and is_block(module)]


def embeddings_of(model: nn.Module) -> set[torch.Tensor]:
    """The weights of embeddings, with an output layer that is tied to one."""
    return {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}


class _InPlace(ReduceScatter):
    """The reduction of a gradient over one rank: what comes in is what goes out.

    FSDP asks for a buffer for what comes in, then for one for what goes out, and copies between them; a copy of a
    tensor to itself is none.
    """

    def __init__(self) -> None:
        self._given: torch.Tensor | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The same tensor twice."""
        if self._given is None:
            self._given = torch.empty(*size, dtype=dtype, device=device)
            return self._given
        given, self._given = self._given, None
        return given

    def __call__(self, *_: Any, **__: Any) -> None:
        """Never called for one rank."""
        raise AssertionError("one rank has nobody to reduce with")


def compile_blocks(model: PreTrainedModel) -> None:
    """Compiles the transformer blocks of a sharded model, but for their attention, whose packs are never the same."""
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
    for module in model.modules():
        if isinstance(module, FSDPModule) and module is not model:
            # Its forward and not its call: FSDP's hooks stay outside.
            block = cast(nn.Module, module)
            # Not dynamic=True: with the size of a head as a variable, the gradient of rotary positions is slow.
            block.forward = torch.compile(block.forward)


def _assert_sharded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_quantized(parameter):
            continue
        assert isinstance(parameter, DTensor), f"{name} is not sharded"
        *replicas, sharded = parameter.placements
        assert sharded.is_shard(), f"{name} is {parameter.placements}"
        assert all(placement.is_replicate() for placement in replicas), f"{name} is {parameter.placements}"


def set_gradient_sync(model: nn.Module, sync: bool, last: bool) -> None:
    """What the next backward pass does with gradients.

    Args:
        model: A sharded model.
        sync: Whether it sums them over the ranks that share a copy of the weights.
        last: Whether it then sums them over copies too: once for each update, whatever is added up before.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(sync)
    model.set_requires_all_reduce(last)


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


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; a plain one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state on rank 0, on the CPU, with an adapter without what is frozen; empty on the other ranks.

    Names of a tied weight have one tensor, so that it is written once.

    Collective: all ranks.
    """
    adapted = any(
        is_adapters(name) for name, _ in model.named_parameters()
    )  # Some models freeze weights by themselves.
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapted)
    state = get_model_state_dict(model, options=options)
    first = dict[torch.Tensor, str]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (known := first.setdefault(tensor, name)) != name and known in state and name in state:
            state[name] = state[known]
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
