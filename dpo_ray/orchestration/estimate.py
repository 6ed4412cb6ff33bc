"""`dpo-ray plan`: what a run will take, before there is a cluster for it. Needs no Ray and reads no weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dpo_ray import storage
from dpo_ray.config import Config, parse_config
from dpo_ray.errors import ConfigError, DpoRayError
from dpo_ray.model.files import check_trainable
from dpo_ray.model.footprint import policy_footprint, reference_footprint
from dpo_ray.orchestration.prepare import prepared
from dpo_ray.pairs.store import read_chunk
from dpo_ray.training.sizing import MOST_WORKERS, Hardware, Scale, Sizing

PATIENCE_S = 5.0
# Of a pair that is not known: tokens, and the share of them that the two answers have.
PAIR_TOKENS, ANSWERS_SHARE = 1024, 2 / 3
# What needs less memory for more time, in the order in which it is worth a try.
REMEDIES: tuple[tuple[str, str, Any], ...] = (
    ("scaling", "shard_over", "all"),
    ("model", "gradient_checkpointing", True),
    ("model", "gradient_checkpointing", "offload"),
    ("model", "cpu_offload", True),
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will take.

    Attributes:
        workers: For which `moments` holds.
        moments: Bytes of a worker's device at each moment of a step, by what they are for.
        reference: Bytes of a device of the reference; None where the run has none in actors.
        scales: The run with 1, 2, 4 ... workers.
        least_workers: The fewest workers that the run fits on.
        remedies: Settings with which it fits on fewer, and on how many.
        assumptions: What all this goes by, a sentence each.
    """

    workers: int
    moments: dict[str, dict[str, int]]
    reference: dict[str, int] | None
    scales: list[Scale]
    least_workers: int | None
    remedies: dict[str, int]
    assumptions: list[str]


def estimate(
    config: Config, hardware: Hardware, workers: int | None = None, pair_tokens: int | None = None
) -> Estimate:
    """Says what a run will take.

    Args:
        config: The run.
        hardware: What will be rented.
        workers: For the memory of a device; by default the fewest that the run may have.
        pair_tokens: Mean tokens of a pair, its prompt once; by default those of the prepared pairs, where there are.

    Raises:
        ConfigError: A model is not there, or cannot be sized.
        StorageError: It cannot be reached.
    """
    with storage.patience(PATIENCE_S):
        check_trainable(config.model.path)
        (tokens, answers), about_pairs = _mean_pair(config, pair_tokens)
        parts = [tokens - answers, answers / 2, answers / 2]
        if config.objective.chosen_only:
            # What is rejected is not computed.
            parts.pop()
            tokens, answers = sum(parts), parts[1]
        lengths = [max(1, round(part)) for part in parts]
        scores = config.needs_reference and config.reference.place == "actors" and not config.reference.columns
        reference = reference_footprint(config, lengths) if scores else None
        sizing = Sizing(config, policy_footprint(config, lengths), reference, (tokens, answers), hardware)
    least = sizing.least_workers()
    workers = workers or config.scaling.min_workers
    return Estimate(
        workers=workers,
        moments=sizing.moments(workers, sizing.load(workers)),
        reference=sizing.reference_parts() if sizing.reference else None,
        scales=[sizing.scale(2**power) for power in range(MOST_WORKERS.bit_length())],
        least_workers=least,
        remedies=dict(_remedies(sizing, lengths, least)),
        assumptions=[about_pairs, *_assumptions(config, hardware)],
    )


def _mean_pair(config: Config, given: int | None) -> tuple[tuple[float, float], str]:
    """Mean tokens of a pair, and of its answers; and where they are from."""
    tokens, answers = float(given or PAIR_TOKENS), ANSWERS_SHARE * (given or PAIR_TOKENS)
    said = f"a pair has {tokens:,.0f} tokens, its prompt once and {ANSWERS_SHARE:.0%} of them the answers'"
    if given is not None:
        return (tokens, answers), said
    try:
        made = prepared(config)
    except DpoRayError as error:
        return (tokens, answers), f"{said}, for {str(error).splitlines()[0]}; --pair-tokens says otherwise"
    tokens = sum(chunk.num_tokens for chunk in made.train) / sum(chunk.num_pairs for chunk in made.train)
    sample = [(sum(map(len, pair.answers)), sum(map(len, pair.parts))) for pair in read_chunk(made.uri, made.train[0])]
    answers = tokens * sum(each[0] for each in sample) / sum(each[1] for each in sample)
    return (tokens, answers), f"a pair has {tokens:,.0f} tokens, as the prepared ones have on average"


def _remedies(sizing: Sizing, lengths: list[int], least: int | None) -> Iterator[tuple[str, int]]:
    best, config = least or MOST_WORKERS + 1, sizing.config
    for section, key, value in REMEDIES:
        given = config.model_dump()
        try:
            other = parse_config({**given, section: {**given[section], key: value}})
        except ConfigError:
            continue  # It does not go with another setting.
        if other == config or best == 1:
            continue
        same = key != "gradient_checkpointing"
        policy = sizing.policy if same else policy_footprint(other, lengths)
        found = replace(sizing, config=other, policy=policy).least_workers()
        if found is not None and found < best:
            best = found
            yield f"{section}.{key}: {str(value).lower()}", found


def _assumptions(config: Config, hardware: Hardware) -> Iterator[str]:
    network = hardware.network
    yield (
        f"a device does {hardware.tflops:g} TFLOP/s at most, and {hardware.utilisation:.0%} of that: for each token 6 "
        "operations per trained weight, 4 per frozen one, 2 more with gradient checkpointing, 2 for the reference's "
        "scores; attention is not counted"
    )
    yield (
        f"{network.devices_per_node} devices of a node exchange {network.near_gb_s:g} GB/s each, beyond it "
        f"{network.far_gb_s:g} GB/s each, all of a node together as many times that, and each collective takes "
        f"{network.latency_us:g} us per further node; what fits beside computation is free"
    )
    yield (
        f"tensors may take 85 % of a device's {hardware.memory_gib:g} GiB; the rest is for fragments, CUDA and NCCL; "
        "every microbatch is full"
    )
    yield (
        f"{hardware.price_per_hour:g} an hour for each device, also of the reference, which scores each pair once; "
        "start, evaluation and checkpoints are not counted"
    )
    if config.train.eval_place == "actors":
        yield (
            f"the replica that evaluates (train.eval_place: actors) keeps {config.reference.devices_per_replica} of "
            "these devices as long as training takes"
        )
    if config.scaling.shard_over != "all":
        yield (
            f"scaling.shard_over is {config.scaling.shard_over}: nodes are full, and what copies of the weights sum of "
            "their gradients once for each step comes after all else"
        )
    if not config.scaling.gpus_per_worker:
        yield (
            "scaling.gpus_per_worker is 0: a CPU does less than a GPU, --device-tflops says how much; its processes "
            "keep memory that tensors leave behind, and take up to 1.8 times as much"
        )
    if config.model.compile:
        yield "model.compile is true, and what it saves of activations is not counted"
    if config.sft.epochs:
        yield "the start by likelihood (sft.epochs) comes before, and is not counted"
    if config.reference.sync_steps:
        yield "the reference moves (reference.sync_steps), and what it scores anew is not counted"
