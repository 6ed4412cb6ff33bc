"""The tensors of a checkpoint: what training changes of a model and its optimizer, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dpo_ray.errors import CheckpointError
from dpo_ray.model.adapter import is_adapters

# Of the names of tensors. What others read who want nothing else, the policy or a moving reference, is in files of its
# own: the optimizer's state is twice the policy's weights.
REFERENCE, MODEL, OPTIMIZER = "reference.", "model.", "optimizer."


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's parameters by name, each once."""
    return {name: tensor for tensor, name in _names_of(model).items() if isinstance(tensor, nn.Parameter)}


def _names_of(model: nn.Module) -> dict[torch.Tensor, str]:
    """What is in a model's state; a tied weight once.

    FSDP2 takes the call as the sign to put its sharded parameters in place.
    """
    names: dict[torch.Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, name)
    return names


def tensors_of(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor that training changes, by a name that does not depend on the world size.

    Raises:
        CheckpointError: The optimizer has state that is no tensor: a checkpoint would lose it.
    """
    tensors: dict[str, Any] = dict(tensors_of_model(model))
    names = {tensor: name.removeprefix(MODEL) for name, tensor in tensors.items()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"{OPTIMIZER}{names[parameter]}.{key}": value for key, value in state.items()}
    for index, group in enumerate(optimizer.param_groups):
        # All else of a group is the configuration's: a hyperparameter, or the learning rate of the next step.
        state = {key: value for key, value in group.items() if key != "params" and key not in optimizer.defaults}
        tensors |= {f"{OPTIMIZER}group-{index}.{key}": value for key, value in state.items()}
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{name} is no tensor but {value!r}: checkpoints do not hold such optimizer state")
    return tensors


def tensors_of_model(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those that training changes, but for the optimizer's."""
    names = _names_of(model)
    if any(map(is_adapters, names.values())):
        # Not what else is in the state: quantized weights have their scales there.
        kept = {one for one in model.parameters() if one.requires_grad} | set(model.buffers())
        names = {one: name for one, name in names.items() if one in kept}
    return {f"{MODEL}{name}": tensor for tensor, name in names.items()}


def of_this_copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of tensors that groups of ranks have a copy of each, those that this rank's group writes: all write as much."""
    written: dict[int, int] = {}
    own = {}
    # In the order in which all ranks see them, whatever they are.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        if isinstance(tensor, DTensor) and tensor.device_mesh.ndim > 1:
            copies = range(tensor.device_mesh.size(0))
            writer = min(copies, key=lambda copy: written.get(copy, 0))
            written[writer] = written.get(writer, 0) + tensor.nbytes
            if writer != tensor.device_mesh.get_local_rank(0):
                continue
        own[name] = tensor
    return own


def make_state(optimizer: Optimizer) -> None:
    """Makes an optimizer's tensors by a step without gradient; what they hold is about to be replaced."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
