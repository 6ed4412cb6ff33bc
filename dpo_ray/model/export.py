"""The trained model as a transformers directory: safetensors, tokenizer, generation config, model card."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import torch.distributed as dist
from torch import nn
from transformers import GenerationConfig

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.model.files import load_tokenizer, localize
from dpo_ray.model.load import DTYPES, empty_model
from dpo_ray.model.shard import gathered_state_dict


def export(model: nn.Module, config: Config, step: int, rank: int, fence: Callable[[], None]) -> None:
    """Writes `<run>/export`; `exported.json`, written last, says of which step the model is.

    Args:
        model: The sharded policy.
        config: The run.
        step: Optimizer steps done.
        rank: Rank 0 writes.
        fence: Raises when another attempt has begun.

    Collective: all ranks.
    """
    state = gathered_state_dict(model)
    if rank == 0:
        whole = empty_model(config.model.path, config.model.weights_dtype, config.model.attention)
        whole.config.dtype = DTYPES[config.model.weights_dtype]
        with tempfile.TemporaryDirectory(prefix="dpo_ray-export-") as folder:
            whole.save_pretrained(folder, state_dict=state)
            load_tokenizer(config.model.tokenizer or config.model.path).save_pretrained(folder)
            source = localize(config.model.path)
            if os.path.exists(os.path.join(source, "generation_config.json")):
                GenerationConfig.from_pretrained(source).save_pretrained(folder)
            with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as card:
                card.write(model_card(config, step))
            target = storage.join(config.run_uri, "export")
            fence()
            storage.remove(storage.join(target, "exported.json"))
            for name in sorted(os.listdir(folder)):
                storage.upload(os.path.join(folder, name), storage.join(target, name))
            fence()
            storage.write_json(storage.join(target, "exported.json"), {"step": step})
    dist.barrier()


def model_card(config: Config, step: int) -> str:
    """A short model card."""
    objective = config.objective
    return (
        "---\nlibrary_name: transformers\ntags: [dpo, dpo_ray]\n---\n\n"
        f"# {config.name}\n\n"
        f"Trained with dpo_ray from `{os.path.basename(config.model.path.rstrip('/'))}` by preference optimization.\n\n"
        "| | |\n| --- | --- |\n"
        f"| objective | {objective.loss}, beta {objective.beta:g}, label smoothing {objective.label_smoothing:g} |\n"
        f"| optimizer | {config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}, "
        f"{config.optimizer.schedule}, warm-up {config.optimizer.warmup_steps} steps |\n"
        f"| pairs per step | {config.train.global_batch_pairs} |\n"
        f"| steps | {step} |\n"
        f"| max_length | {config.data.max_length} |\n"
        f"| weights, compute | {config.model.weights_dtype}, {config.model.compute_dtype} |\n"
    )
