"""Evaluations beside training: a checkpoint in, a line of metrics out, and between them is only the run's folder.

    evaluations/step-00000050-attempt-0003.json    of the checkpoint after step 50 that attempt 3 has written

Whoever records the run's metrics takes the lines from there. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_ray import storage
from dpo_ray.config import TrainConfig
from dpo_ray.errors import CheckpointError
from dpo_ray.training import manifest
from dpo_ray.types import Attempt

_NAME = re.compile(r"step-(\d+)-attempt-(\d+)[.]json")


class Made(NamedTuple):
    """A checkpoint.

    Attributes:
        step: Optimizer steps.
        attempt: Who wrote it: another attempt's weights after the same steps may differ in their last bits.
    """

    step: int
    attempt: int


def is_due(config: TrainConfig, step: int, total_steps: int) -> bool:
    """Whether there is an evaluation after a step."""
    every = config.eval_every_steps
    return every is not None and (step % every == 0 or step == total_steps)


def put(run_uri: str, made: Made, line: Mapping[str, Any]) -> None:
    """Leaves the evaluation of a checkpoint for the recorder."""
    storage.write_json(_place(run_uri, made), dict(line))


def read(run_uri: str, made: Made) -> dict[str, Any]:
    """The evaluation of a checkpoint."""
    return dict(storage.read_json(_place(run_uri, made)))


def there(run_uri: str) -> list[Made]:
    """The checkpoints that have been evaluated, by step."""
    found = map(_NAME.fullmatch, storage.list_names(storage.join(run_uri, "evaluations")))
    return sorted(Made(int(each[1]), int(each[2])) for each in found if each)


def maker(attempts: Sequence[Attempt], step: int) -> int:
    """The attempt that has done a step for good: the last of those that began before it."""
    return max((each.attempt for each in attempts if each.position < step), default=-1)


def waiting(
    run_uri: str, config: TrainConfig, total_steps: int, damaged: Callable[[str, str], None] = lambda name, why: None
) -> list[Made]:
    """The checkpoints that are still to be evaluated, oldest first.

    Args:
        run_uri: The run.
        config: What is evaluated.
        total_steps: Where training ends.
        damaged: Told of a checkpoint whose manifest cannot be read.
    """
    names = [name for name in manifest.committed(run_uri) if is_due(config, manifest.step_of(name), total_steps)]
    done, found = there(run_uri), list[Made]()
    for name in names:
        try:
            made = Made(manifest.step_of(name), manifest.read_manifest(run_uri, name).attempt)
        except FileNotFoundError:
            continue  # Removed just now.
        except CheckpointError as error:
            damaged(name, str(error))
            continue
        if made not in done:
            found.append(made)
    return found


def _place(run_uri: str, made: Made) -> str:
    return storage.join(run_uri, "evaluations", f"step-{made.step:08d}-attempt-{made.attempt:04d}.json")
