"""Which checkpoints there are: the manifests on storage are the one truth. Needs no torch.

    checkpoints/step-00000050/
        attempt-0007/         what one attempt wrote: layout.json; rank-0000.safetensors, optimizer-0000..., ...
        manifest.json         the commit: whose files are the checkpoint, with the size and SHA-256 of each
        set-aside-0007.json   why attempt 7's files are no checkpoint any more, and the manifest that they had

A manifest is put in place as a whole, after all that it names: at any time a step has the old checkpoint or the new
one. What no manifest and no set-aside record names is left over from a death, and `collect_orphans` removes it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

from dpo_ray import storage
from dpo_ray.errors import CheckpointError, FencedError, VersionError
from dpo_ray.types import TrainState

log = logging.getLogger(__name__)
FORMAT_VERSION, READ_VERSIONS = 4, (2, 3, 4)
_STEP = re.compile(r"step-\d+")
_MANIFEST, _ASIDE, _ATTEMPT = "manifest.json", "set-aside-", "attempt-"
_UNREADABLE = f"{_ASIDE}unreadable.json"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file of a checkpoint must be: its size in bytes, and its SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What makes files a checkpoint.

    Attributes:
        state: All of the run that is no tensor.
        attempt: Who wrote the files.
        world_size: How many ranks wrote them.
        files: By path below the step's folder.
    """

    state: TrainState
    attempt: int
    world_size: int
    files: dict[str, FileRecord]


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The step of a checkpoint, by its name."""
    return int(name.removeprefix("step-"))


def checkpoint_uri(run_uri: str, name: str) -> str:
    """The folder of a checkpoint."""
    return storage.join(run_uri, "checkpoints", name)


def attempt_folder(attempt: int) -> str:
    """The folder, within a checkpoint's, of the files of one attempt."""
    return f"{_ATTEMPT}{attempt:04d}"


def newest(run_uri: str) -> tuple[str, Manifest] | None:
    """Name and manifest of the newest committed checkpoint that has not been set aside.

    A manifest that cannot be read sets its checkpoint aside.

    Raises:
        VersionError: It is of another version of this package.
    """
    for name in reversed(committed(run_uri)):
        try:
            return name, read_manifest(run_uri, name)
        except CheckpointError as error:
            set_aside(run_uri, name, str(error))
        except FileNotFoundError:
            continue  # Removed since it was listed.
    return None


def committed(run_uri: str) -> list[str]:
    """Names of the checkpoints that have a manifest and have not been set aside, oldest first."""
    return [name for name, there in _listed(run_uri).items() if _is_committed(run_uri, name, there)]


def set_aside_records(run_uri: str) -> list[tuple[str, str]]:
    """Names of checkpoints that have been set aside, oldest first, and why; one may have been written anew since."""
    found = list[tuple[str, str]]()
    for name, there in _listed(run_uri).items():
        for record in there:
            if record.startswith(_ASIDE):
                about = storage.read_json(storage.join(checkpoint_uri(run_uri, name), record))
                found.append((name, str(about["reason"])))
    return found


def read_manifest(run_uri: str, name: str) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: It is damaged.
        VersionError: It is whole, and of another version of this package.
        FileNotFoundError: There is none.
    """
    place = storage.join(checkpoint_uri(run_uri, name), _MANIFEST)
    try:
        raw = storage.read_json(place)
        if int(raw["format"]) not in READ_VERSIONS:
            raise VersionError(
                f"{place}: a checkpoint of format {raw['format']}, this version of dpo_ray reads "
                f"{', '.join(map(str, READ_VERSIONS))}: "
                "go on with the version that wrote it, or choose another name for a new run"
            )
        files = {path: FileRecord(int(about["size"]), str(about["sha256"])) for path, about in raw["files"].items()}
        state = TrainState(**raw["state"])
        if not isinstance(state.step, int) or checkpoint_name(state.step) != name:
            raise ValueError(f"it says step {state.step!r}")
        return Manifest(state, int(raw["attempt"]), int(raw["world_size"]), files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{place}: damaged: {error}") from None


def commit(run_uri: str, manifest: Manifest, before_commit: Callable[[], None]) -> None:
    """Makes files a checkpoint: the newest attempt's manifest is a step's.

    Args:
        run_uri: The run.
        manifest: What is written.
        before_commit: Called right before; when it raises, nothing is committed.

    Raises:
        FencedError: A newer attempt has committed this step.
    """
    name = checkpoint_name(manifest.state.step)
    place = storage.join(checkpoint_uri(run_uri, name), _MANIFEST)
    try:
        there = read_manifest(run_uri, name).attempt
    except (FileNotFoundError, CheckpointError):
        there = manifest.attempt
    if there > manifest.attempt:
        raise FencedError(f"{place}: attempt {there} has committed it, attempt {manifest.attempt} must end")
    before_commit()
    storage.write_json(place, {"format": FORMAT_VERSION, **asdict(manifest)})


def set_aside(run_uri: str, name: str, reason: str) -> None:
    """Takes a checkpoint that fails verification out of the way: it does not exist any more, but can be looked at."""
    place = checkpoint_uri(run_uri, name)
    try:
        manifest = storage.read_bytes(storage.join(place, _MANIFEST))
    except FileNotFoundError:
        return
    try:
        record = f"{_ASIDE}{read_manifest(run_uri, name).attempt:04d}.json"
    except CheckpointError:
        record = _UNREADABLE
    # The record first: it is enough to set the checkpoint aside, should the power fail before the manifest is gone.
    storage.write_json(storage.join(place, record), {"reason": reason, "manifest": manifest.decode(errors="replace")})
    storage.remove(storage.join(place, _MANIFEST))
    log.warning("%s: set aside: %s", name, reason)


def prune(
    run_uri: str,
    keep: int,
    attempt: int,
    best_step: int | None = None,
    spared: Collection[str | None] = (),
    needed: Callable[[int], bool] = lambda step: False,
) -> None:
    """Removes what is older than the newest `keep` checkpoints, what was set aside too, but not the best one.

    Args:
        run_uri: The run.
        keep: How many.
        attempt: Who asks. A folder that a newer attempt writes to is left alone.
        best_step: Kept, however old.
        spared: Names that are kept too.
        needed: Of which steps checkpoints are kept too.
    """
    steps = _listed(run_uri)
    kept = [name for name, there in steps.items() if _is_committed(run_uri, name, there)][-keep:]
    best = None if best_step is None else checkpoint_name(best_step)
    for name, there in steps.items():
        newer = any(number > attempt for number in _numbers(there, _ATTEMPT))
        is_needed = _MANIFEST in there and needed(step_of(name))
        if kept and name < kept[0] and name != best and name not in spared and not newer and not is_needed:
            # The manifest first: what is left of a removal cut short must not look like a checkpoint.
            storage.remove(storage.join(checkpoint_uri(run_uri, name), _MANIFEST))
            storage.remove(checkpoint_uri(run_uri, name))


def collect_orphans(run_uri: str, live_attempt: int) -> list[str]:
    """Removes files of earlier attempts that belong to no checkpoint and to none that was set aside.

    They are left over from saves and removals that a death cut short. It lists the checkpoints, and each of them once.

    Args:
        run_uri: The run.
        live_attempt: What this attempt and newer ones write is never touched.

    Returns:
        The folders that were removed.
    """
    removed = []
    for name, there in _listed(run_uri).items():
        place = checkpoint_uri(run_uri, name)
        old = [attempt_folder(attempt) for attempt in _numbers(there, _ATTEMPT) if attempt < live_attempt]
        named = {attempt_folder(attempt) for attempt in _numbers(there, _ASIDE)}
        if _MANIFEST in there:
            try:
                named.add(attempt_folder(read_manifest(run_uri, name).attempt))
            except (CheckpointError, FileNotFoundError):
                continue  # Damaged, and soon set aside; or replaced just now.
        if _UNREADABLE in there:
            continue  # Nobody knows whose files its manifest named.
        for orphan in (storage.join(place, folder) for folder in old if folder not in named):
            storage.remove(orphan)
            removed.append(orphan)
    return removed


def take_best(metric: str, line: dict[str, Any], state: TrainState) -> bool:
    """Notes an evaluation that is better than every one before it; the first of equals stays the best.

    Args:
        metric: `train.keep_best`.
        line: The evaluation.
        state: With the best one so far. A best of another metric does not count.

    Returns:
        Whether it is; the state then says so.
    """
    value, best = float(line[metric]), state.best_value if state.best_metric == metric else None
    if not math.isfinite(value):
        return False
    if best is not None and not (value < best if metric == "eval_loss" else value > best):
        return False
    state.best_metric, state.best_step, state.best_value = metric, line["step"], line[metric]
    return True


def _listed(run_uri: str) -> dict[str, list[str]]:
    """What is in the folder of each step, oldest first."""
    folder = storage.join(run_uri, "checkpoints")
    names = [name for name in storage.list_names(folder) if _STEP.fullmatch(name)]
    return {name: storage.list_names(storage.join(folder, name)) for name in names}


def _is_committed(run_uri: str, name: str, there: list[str]) -> bool:
    if _MANIFEST not in there:
        return False
    aside = _numbers(there, _ASIDE)
    if not aside:
        return True
    # Set aside, and written anew by a later attempt; or the power failed between record and manifest.
    try:
        return read_manifest(run_uri, name).attempt not in aside
    except CheckpointError:
        return True
    except FileNotFoundError:
        return False


def _numbers(there: list[str], prefix: str) -> list[int]:
    """The attempts that have a folder, or a record, with this prefix."""
    names = [name.removeprefix(prefix).removesuffix(".json") for name in there if name.startswith(prefix)]
    return [int(number) for number in names if number.isdigit()]
