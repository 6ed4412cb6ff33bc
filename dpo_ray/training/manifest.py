"""Which checkpoints there are: the manifests on storage are the one truth. Needs no torch."""

from __future__ import annotations

from typing import Any

from dpo_ray import storage
from dpo_ray.errors import CheckpointError
from dpo_ray.types import TrainState

FORMAT_VERSION = 1


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def newest(run_uri: str) -> tuple[str, TrainState] | None:
    """Name and state of the newest committed checkpoint that has not been set aside.

    A manifest that cannot be read sets its checkpoint aside.
    """
    for name in reversed(committed(run_uri)):
        try:
            return name, TrainState(**read_manifest(run_uri, name)["state"])
        except CheckpointError as error:
            set_aside(run_uri, name, str(error))
    return None


def committed(run_uri: str) -> list[str]:
    """Names of the checkpoints that have a manifest and have not been set aside, oldest first."""
    folder = storage.join(run_uri, "checkpoints")
    files = {name: storage.list_names(storage.join(folder, name)) for name in storage.list_names(folder)}
    return [name for name, there in files.items() if "manifest.json" in there and "set_aside.json" not in there]


def read_manifest(run_uri: str, name: str) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: It is damaged, or written by another version.
    """
    place = storage.join(run_uri, "checkpoints", name, "manifest.json")
    try:
        manifest = storage.read_json(place)
        version, _, _ = manifest["format"], manifest["state"], manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{place}: damaged: {error}") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{place}: format {version}, this version reads {FORMAT_VERSION}")
    return dict(manifest)


def set_aside(run_uri: str, name: str, reason: str) -> None:
    """Marks a checkpoint that fails verification: it does not exist any more, but can be looked at."""
    storage.write_json(storage.join(run_uri, "checkpoints", name, "set_aside.json"), {"reason": reason})


def prune(run_uri: str, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints."""
    for name in committed(run_uri)[:-keep]:
        folder = storage.join(run_uri, "checkpoints", name)
        # The manifest first: what is left of a removal cut short must not look like a checkpoint.
        storage.remove(storage.join(folder, "manifest.json"))
        storage.remove(folder)
