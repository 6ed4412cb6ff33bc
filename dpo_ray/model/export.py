"""The trained model as a transformers directory: safetensors, tokenizer, generation config, model card.

Of a run with an adapter it is the model with the adapter merged into it, or the adapter alone, as peft reads it. The
model is the one at `model.path` also where the adapter was trained beside its quantized weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn
from transformers import GenerationConfig

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.model.adapter import merged, save_adapter
from dpo_ray.model.card import model_card
from dpo_ray.model.files import load_tokenizer, localize
from dpo_ray.model.load import DTYPES, empty_model, load_pretrained
from dpo_ray.model.shard import gathered_state_dict

# Files that an export of the other kind may have left.
_KINDS = ("config.json", ".safetensors", ".safetensors.index.json")


def export(
    model: nn.Module, config: Config, step: int, rank: int, fence: Callable[[], None], target: str | None = None
) -> None:
    """Writes the model; `exported.json`, written last, says of which step it is.

    The other ranks return when rank 0 has their parts: what it writes may take longer than any collective waits.

    Args:
        model: The sharded policy.
        config: The run.
        step: Optimizer steps done.
        rank: Rank 0 writes.
        fence: Raises when another attempt has begun.
        target: Where to; None: `<run>/export`.

    Collective: all ranks.
    """
    state = gathered_state_dict(model)
    if rank == 0:
        with storage.scratch("export") as folder:
            with storage.while_it_grows(folder):
                _write_model(folder, model, config, state)
            load_tokenizer(config.tokenizer_path).save_pretrained(folder)
            with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as card:
                card.write(model_card(config, step))
            target = target or storage.join(config.run_uri, "export")
            fence()
            storage.remove(storage.join(target, "exported.json"))
            for name in storage.list_names(target):
                if name.endswith(_KINDS) and not os.path.exists(os.path.join(folder, name)):
                    storage.remove_file(storage.join(target, name))
            for name in sorted(os.listdir(folder)):
                storage.upload(os.path.join(folder, name), storage.join(target, name))
            fence()
            storage.write_json(storage.join(target, "exported.json"), {"step": step, "merged": config.adapter.merge})


def _write_model(folder: str, model: nn.Module, config: Config, state: dict[str, torch.Tensor]) -> None:
    path, dtype, attention = config.model.path, config.model.weights_dtype, config.model.attention
    if config.adapter.rank is not None and not config.adapter.merge:
        save_adapter(folder, model, path, state)
        return
    if config.adapter.rank is None:
        whole = empty_model(path, dtype, attention)
        whole.config.dtype = DTYPES[dtype]
        whole.save_pretrained(folder, state_dict=state)
    else:
        # In bfloat16 most of what an adapter adds to a weight would round to nothing. One that was trained beside
        # quantized weights goes into those that they were made of.
        with storage.scratch("adapter") as alone:
            save_adapter(alone, model, path, state)
            merged(load_pretrained(path, "float32", attention), alone).save_pretrained(folder)
    source = localize(path, weights=False)
    if os.path.exists(os.path.join(source, "generation_config.json")):
        GenerationConfig.from_pretrained(source).save_pretrained(folder)
