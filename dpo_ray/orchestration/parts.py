"""Work in parts: actors of a Ray Data job make them, one file each, and what is there is never made again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from dpo_ray.config import Config, EvaluationConfig, PairsConfig
from dpo_ray.errors import ActorsLostError
from dpo_ray.orchestration.resources import check_actor_room
from dpo_ray.orchestration.trainer import start_ray
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.orchestration.worker import behind, final_error


def make_parts(
    config: Config,
    options: EvaluationConfig | PairsConfig,
    items: Sequence[str],
    actor: type,
    arguments: tuple[Any, ...],
    doing: str,
    watcher: Watcher,
) -> None:
    """Has a part made of each item.

    Args:
        config: The run.
        options: How many actors, and what each of them takes.
        items: What the actor's `__call__` is given as `item`, one at a time.
        actor: Its class.
        arguments: What it is made with.
        doing: For people.
        watcher: Told how many parts are made.

    Raises:
        ConfigError: No node could ever hold an actor.
        ActorsLostError: Actors died more often than `recovery.max_reference_failures` allows.
        FinalError: What an actor raised that it would raise again.
    """
    start_ray(config)
    section = "pairs" if isinstance(options, PairsConfig) else "evaluation"
    limit = config.recovery.max_reference_failures
    check_actor_room(section, options.cpus_per_actor, options.gpus_per_actor, watcher)
    made = ray.data.from_items(list(items), override_num_blocks=len(items)).map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(options.actors, len(items))),
        num_cpus=options.cpus_per_actor,
        num_gpus=options.gpus_per_actor,
        # By itself Ray Data starts them again for ever, also where one dies of too little memory each time.
        max_restarts=limit,
        max_task_retries=limit,
    )
    try:
        for done, _ in enumerate(made.iter_rows(), start=1):
            watcher.progress(f"{doing} (parts)", done, len(items))
    except Exception as error:
        if final := final_error(error):
            raise final from None
        if behind(error, RayActorError):
            raise ActorsLostError(
                f"{doing}: an actor's process died {limit + 1} times, recovery.max_reference_failures is {limit}. "
                f"Where its node has too little memory for the models, lower {section}.actors, or raise {section}."
                "cpus_per_actor so that fewer share a node; what is done is kept: give the same command again"
            ) from None
        raise
