"""A checkpoint that a run keeps, as a transformers directory: in one process, without Ray."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import yaml

from dpo_ray import storage
from dpo_ray.config import Config, apply_overrides, parse_config
from dpo_ray.errors import ConfigError, DataError, first_line
from dpo_ray.training.manifest import checkpoint_name, committed, newest, read_manifest


def read_run(run_uri: str, overrides: Sequence[str] = ()) -> tuple[Config, dict[str, Any], dict[str, Any]]:
    """What a run's folder says of it.

    Args:
        run_uri: The folder; it may have been moved, with the stores beside it.
        overrides: Each `section.key=value`.

    Returns:
        Its configuration with the overrides, as plain data without them, and what `config.yaml` says besides.

    Raises:
        DataError: There is no run, or its file is damaged.
        ConfigError: It is no configuration, with the overrides.
    """
    source = storage.join(run_uri, "config.yaml")
    try:
        described = yaml.safe_load(storage.read_bytes(source))
    except FileNotFoundError:
        raise DataError(
            f"{run_uri}: not the directory of a run: it has no config.yaml; give <storage_path>/<name>, or train first"
        ) from None
    except yaml.YAMLError as error:
        raise DataError(f"{source}: damaged: {first_line(error)}") from None
    parts = [described.get(key) for key in ("config", "about")] if isinstance(described, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise DataError(f"{source}: not what a run writes there; give <storage_path>/<name> of a run")
    place, _, name = run_uri.rpartition("/")
    stored = described["config"] | {"storage_path": place, "name": name}
    raw = copy.deepcopy(stored)
    apply_overrides(raw, list(overrides))
    return parse_config(raw, source=source), stored, described["about"]


def export_kept(run_uri: str, name: str | None = None, output: str | None = None) -> tuple[str, int]:
    """Writes a checkpoint's model; the process holds it twice in float32, or whatever `model.weights_dtype` says.

    Args:
        run_uri: The run; it may go on meanwhile.
        name: The checkpoint's, such as `step-00000050`; None: the best one by `train.keep_best`, or else the newest.
        output: Where to; None: `<run>/exports/<checkpoint>`.

    Returns:
        Where it is, and after how many optimizer steps the model was so.

    Raises:
        DataError: There is no run.
        ConfigError: It has no such checkpoint.
        CheckpointError: It is damaged, and has been set aside; or it was removed meanwhile.
    """
    config, *_ = read_run(run_uri)
    name = chosen(config, name)
    target = output or storage.join(run_uri, "exports", name)
    # Who asks for a run's configuration alone needs no model.
    import torch
    import torch.distributed as dist

    from dpo_ray.model.export import export
    from dpo_ray.model.shard import sharded_policy
    from dpo_ray.training.checkpoint import read_policy

    with tempfile.TemporaryDirectory(prefix="dpo_ray-export-") as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/alone", rank=0, world_size=1)
        try:
            plain = config.model.model_copy(update={"cpu_offload": False, "compile": False})
            model = sharded_policy(plain, torch.device("cpu"), config.adapter, config.seed)
            state = read_policy(run_uri, name, read_manifest(run_uri, name).attempt, model)
            export(model, config, state.step, 0, lambda: None, target)
        finally:
            dist.destroy_process_group()
    return target, state.step


def chosen(config: Config, name: str | None) -> str:
    """The checkpoint that is meant; see `export_kept`."""
    there = committed(config.run_uri)
    if name in there:
        return name
    if name is not None and there:
        raise ConfigError(f"{config.run_uri} has no checkpoint {name}; it has {', '.join(there)}")
    found = newest(config.run_uri)
    if found is None:
        raise ConfigError(f"{config.run_uri} has no checkpoint yet: `dpo-ray train` makes them")
    state, metric = found[1].state, config.train.keep_best
    best = checkpoint_name(state.best_step) if metric and metric == state.best_metric and state.best_step else None
    return best if best in there else found[0]
