"""What a model takes of a device's memory, found out without its weights and without the device.

Its own passes run on the meta device, where tensors have shapes and dtypes but no memory, and after every operation all
that is alive is counted. So what autograd keeps of each layer follows from the code, whatever the model's family. What
FSDP and the optimizer add is arithmetic, see `training.sizing`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, PreTrainedModel

from dpo_ray.config import Config
from dpo_ray.errors import ConfigError
from dpo_ray.model.attention import packed_attention
from dpo_ray.model.files import first_line
from dpo_ray.model.forward import completion_states, output_layer, with_token_scores
from dpo_ray.model.load import DTYPES, empty_model
from dpo_ray.model.shard import blocks_of, embeddings_of, empty_policy
from dpo_ray.objective.logps import completion_token_scores

# Tokens of the smaller of two packs that are tried, for each hidden unit; the other has twice as many. With fewer the
# gradients of a block could be more than its activations, which are what grows with the tokens.
TRIED_TOKENS = 2
# The output layer is tried with a multiple of so many tokens, and with more than the second number it only repeats.
HEAD_STEP, HEAD_MOST = 512, 8192
# What transformers calls attention by one kernel, as GPUs have it, and pair by pair, as CPUs do.
_KERNEL, _BY_PAIR = "kernel_without_memory", "pairs_without_memory"


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter.

    Attributes:
        rows: What FSDP splits.
        numel: All its numbers.
        trained: Whether it has a gradient.
        quantized: Whether it is held in 4 bits, which FSDP neither splits nor gathers.
        embedding: Whether it is an embedding's.
        dims: Of its shape.
    """

    rows: int
    numel: int
    trained: bool
    quantized: bool = False
    embedding: bool = False
    dims: int = 2

    @property
    def smaller_side(self) -> int:
        """Rows, or numbers of each; 1 of what is no matrix."""
        return min(self.rows, self.numel // self.rows) if self.dims == 2 else 1

    def shard(self, workers: int) -> int:
        """Numbers of the largest shard: rows stay whole."""
        return -(-self.rows // workers) * (self.numel // self.rows)


@dataclass(frozen=True, slots=True)
class Growth:
    """Bytes as a function of a microbatch's tokens."""

    fixed: float
    per_token: float

    def at(self, tokens: int) -> int:
        """Bytes."""
        return max(0, round(self.fixed + self.per_token * tokens))


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model is made of, and what its passes take.

    Attributes:
        blocks: Weights of each transformer block, which FSDP gathers by itself.
        rest: The other weights, which it gathers together: embedding, last norm, output layer.
        kept: What the forward pass leaves for the backward pass, without the output layer's.
        working: The most that there is besides: in training in the backward pass, with those gradients of a block's
            weights that are there by then.
        head: The most that the output layer takes, by the number of completion tokens; in training with the gradient
            of its weight.
        head_weight: Numbers of the output layer that have a gradient.
    """

    blocks: tuple[tuple[Weight, ...], ...]
    rest: tuple[Weight, ...]
    kept: Growth
    working: Growth
    head: Callable[[int], int]
    head_weight: int

    @property
    def weights(self) -> tuple[Weight, ...]:
        """All of them."""
        return (*(weight for block in self.blocks for weight in block), *self.rest)


def policy_footprint(config: Config, pair: Sequence[int]) -> Footprint:
    """Of the policy, in training.

    Args:
        config: The run.
        pair: Tokens of the prompt and of each answer.

    Raises:
        ConfigError: There is no such model, or it does not run without memory.
    """
    model, on_gpu = empty_policy(config.model, config.adapter), bool(config.scaling.gpus_per_worker)
    dtype, offload = config.model.compute_dtype, config.model.gradient_checkpointing == "offload"
    quantize = config.adapter.quantize is not None
    return _footprint(config.model.path, model, dtype, "cuda" if on_gpu else "cpu", pair, True, offload, quantize)


def reference_footprint(config: Config, pair: Sequence[int]) -> Footprint:
    """Of the reference, which only scores.

    Args:
        config: The run.
        pair: Tokens of the prompt and of each answer.

    Raises:
        ConfigError: There is no such model, or it does not run without memory.
    """
    path, dtype, on_gpu = config.reference_path, config.reference_dtype, bool(config.reference.gpus_per_replica)
    model = empty_model(path, dtype, config.model.attention).requires_grad_(False)
    return _footprint(path, model, dtype, "cuda" if on_gpu else "cpu", pair, False, False)


def _footprint(
    path: str,
    model: PreTrainedModel,
    dtype: str,
    device_type: str,
    pair: Sequence[int],
    training: bool,
    saves_on_host: bool,
    quantize: bool = False,
) -> Footprint:
    blocks = blocks_of(model)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    linear = {id(module.weight) for block in blocks for module in block.modules() if isinstance(module, nn.Linear)}
    in_4_bits, embeddings = linear if quantize else set(), embeddings_of(model)
    groups = tuple(
        tuple(_weight(parameter, embeddings, id(parameter) in in_4_bits) for parameter in block.parameters())
        for block in blocks
    )
    rest = tuple(_weight(parameter, embeddings) for parameter in model.parameters() if id(parameter) not in inside)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])  # As FSDP gathers it.
    output = model.get_output_embeddings().weight
    head_weight = output.numel() if output.requires_grad else 0
    few = -(-TRIED_TOKENS * model.config.get_text_config().hidden_size // sum(pair))
    try:
        _ready(model, device_type, training)
        tried = [_trunk(model, [list(pair)] * num, training, saves_on_host) for num in (few, 2 * few)]
    except RuntimeError as error:
        raise ConfigError(
            f"{path}: {type(model).__name__} does not run on tensors without memory, so that what it takes is not "
            f"known: {first_line(error)}"
        ) from None
    kept, working = (_line(few * sum(pair), first, second) for first, second in zip(*tried, strict=True))
    of_rows = cache(partial(_head, model, device_type, training))

    def head(num_tokens: int) -> int:
        return of_rows(min(-(-num_tokens // HEAD_STEP) * HEAD_STEP, HEAD_MOST))

    return Footprint(groups, rest, kept, working, head, head_weight)


def _weight(parameter: nn.Parameter, embeddings: set[torch.Tensor], in_4_bits: bool = False) -> Weight:
    trained = parameter.requires_grad
    quantized = in_4_bits and not trained
    about = parameter.shape[0], parameter.numel(), trained
    return Weight(*about, quantized, parameter in embeddings, parameter.ndim)


def _line(tokens: int, first: int, second: int) -> Growth:
    """Through what was found for `tokens` and for twice as many."""
    per_token = (second - first) / tokens
    return Growth(first - per_token * tokens, per_token)


def _ready(model: PreTrainedModel, device_type: str, training: bool) -> None:
    """Has a model of the meta device score packs there as on a device of this type."""
    meta = torch.device("meta")
    with_token_scores(model.to(meta), meta).train(training)
    packed = model.packed
    if model.config._attn_implementation != "eager":
        model.set_attn_implementation(_BY_PAIR if packed and device_type == "cpu" else _KERNEL)
        model.packed = packed
    for block in blocks_of(model):
        _drop_gradients_together(block)
    # Without gradients of their input some checkpoints would not be computed again.
    model.enable_input_require_grads()


def _drop_gradients_together(block: nn.Module) -> None:
    """As FSDP does it: a block's gradients stay until all are there."""
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]

    def arrived(_: torch.Tensor) -> None:
        if all(parameter.grad is not None for parameter in trained):
            for parameter in trained:
                parameter.grad = None

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(arrived)


def _trunk(
    model: PreTrainedModel, lengths: Sequence[Sequence[int]], training: bool, saves_on_host: bool
) -> tuple[int, int]:
    """What the forward pass up to the output layer leaves, and the most that there is besides."""
    tokens = torch.zeros(sum(map(sum, lengths)), dtype=torch.int64)
    embedding = model.get_input_embeddings().weight
    trained = embedding.requires_grad
    # Its gradient comes when all others have gone: it is counted where it stays.
    embedding.requires_grad_(False)
    elsewhere = saved_tensors_hooks(torch.Tensor.size, partial(_fetched, model.dtype))
    with _Alive(model) as alive, torch.set_grad_enabled(training):
        with elsewhere if saves_on_host else nullcontext():
            hidden, *_ = completion_states(model, tokens, lengths)
        kept = alive.now
        if training:
            hidden.backward(torch.empty_like(hidden))
    embedding.requires_grad_(trained)
    return kept, alive.most - kept


def _fetched(dtype: torch.dtype, size: torch.Size) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _head(model: PreTrainedModel, device_type: str, training: bool, rows: int) -> int:
    """The most bytes that the output layer takes for so many tokens."""
    weight, vocab_size = model.get_output_embeddings().weight, model.config.get_text_config().vocab_size
    hidden = torch.empty(rows, weight.shape[1], dtype=weight.dtype, device="meta", requires_grad=training)
    targets = torch.zeros(rows, dtype=torch.int64, device="meta")
    with _Alive(model) as alive, torch.set_grad_enabled(training):
        scores = completion_token_scores(hidden, targets, output_layer(model), vocab_size, device_type)
        if training:
            scores.logps.sum().backward()
    weight.grad = None
    return alive.most


class _Alive(TorchDispatchMode):
    """Counts the bytes of what operations have made on the meta device and what is still there.

    Attributes:
        now: Bytes alive.
        most: The most there have been.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = WeakIdKeyDictionary(ref_type=weakref.ref)
        for tensor in (*model.parameters(), *model.buffers()):
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage not in self._known:
                    self._known[storage] = True
                    self._count(storage.nbytes())
                    weakref.finalize(storage, self._count, -storage.nbytes()).atexit = False
        return found

    def _count(self, change: int) -> None:
        self.now += change
        self.most = max(self.most, self.now)


class _Kernel(torch.autograd.Function):
    """What a kernel for attention takes: it keeps what comes in and goes out, and a number for each token and head."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        found, normalizers = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        added = [] if mask is None else [mask.to(query)]
        ctx.save_for_backward(query, key, value, found, normalizers, *added)
        return found

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override,unused-ignore]
        return (*map(torch.empty_like, ctx.saved_tensors[:3]), None)


class _Kernels(TorchFunctionMode):
    """Without memory PyTorch has no kernel for attention, and would compute all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Kernel.apply(*args, kwargs["attn_mask"])  # type: ignore[no-untyped-call,unused-ignore]
        return func(*args, **(kwargs or {}))


def _kernel(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    found: torch.Tensor = _Kernel.apply(query, key, value, None)  # type: ignore[no-untyped-call,unused-ignore]
    return found.transpose(1, 2), None


def _by_pair(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    with _Kernels():
        return packed_attention(*args, **kwargs)


AttentionInterface.register(_KERNEL, _kernel)
AttentionInterface.register(_BY_PAIR, _by_pair)
