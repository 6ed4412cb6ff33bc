"""The main job: pair store, reference filler and Ray Train's worker group, put together."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray
import yaml

from dpo_ray import storage
from dpo_ray.config import Config, changed_keys
from dpo_ray.errors import ConfigError, LeaseLostError, StorageError, first_line
from dpo_ray.extensions import code_digest
from dpo_ray.lease import RunLease
from dpo_ray.model.card import write_card
from dpo_ray.model.files import check_quantize, check_trainable, relative_costs
from dpo_ray.model.weights import weights_digest
from dpo_ray.orchestration.evaluator import Evaluator
from dpo_ray.orchestration.gauges import Gauges
from dpo_ray.orchestration.moving_filler import MovingFiller
from dpo_ray.orchestration.prepare import Survey, check_reachable, prepare, survey
from dpo_ray.orchestration.reference_filler import (
    ReferenceFiller,
    chunks_in_order_of_need,
    open_reference_store,
)
from dpo_ray.orchestration.resources import ensure_resources, join_cluster
from dpo_ray.orchestration.stop import Stop
from dpo_ray.orchestration.stream import Places, make_plan
from dpo_ray.orchestration.supervisor import supervise
from dpo_ray.orchestration.watch import Watcher, warnings_to
from dpo_ray.orchestration.worker import final_error
from dpo_ray.pairs.pack import Costs
from dpo_ray.pairs.plan import Plan, total_steps
from dpo_ray.pairs.store import PairStore, open_store
from dpo_ray.reference.store import ReferenceStore, error_place
from dpo_ray.reference.usage import note_use
from dpo_ray.report.page import write_report
from dpo_ray.training import evaluations, manifest
from dpo_ray.training.attempts import Fence, read_attempts
from dpo_ray.training.optimizer import check_optimizer
from dpo_ray.training.outcome import write_outcome
from dpo_ray.training.record import Recorder
from dpo_ray.training.trackers import check_trackers
from dpo_ray.types import Attempt

log = logging.getLogger(__name__)

RECORD_PATIENCE_S = 10.0
_STEP_SECONDS = ("step_s", "reference_wait_s")


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run.

    Attributes:
        run_uri: Its folder.
        export_uri: The trained model, a transformers directory.
        steps: Optimizer steps done.
        metrics: The last line of a training step.
        eval_metrics: The last evaluation, empty without one.
        reference: What the last driver's filler has done (see `Filled`), and `waited_share`: the share of the steps'
            seconds in which training waited for scores. Empty where the objective needs none.
    """

    run_uri: str
    export_uri: str
    steps: int
    metrics: dict[str, float]
    eval_metrics: dict[str, float]
    reference: dict[str, float]


def start_ray(config: Config) -> None:
    """Connects to the cluster named by RAY_ADDRESS, or starts Ray on this machine."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # Our errors carry their own message.
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # What matters is raised, or in the log files.
    logging_options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := os.environ.get("RAY_ADDRESS"):
        join_cluster(address, **logging_options)
        return
    # Ray's C++ side writes its errors to the terminal too; what they lead to is raised here.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    wanted = cpus_wanted(config)
    # Logical CPUs: on a small machine the actors share the cores instead of waiting for one another for ever.
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, int(wanted + 0.999)),
        include_dashboard=False,
        **logging_options,
    )


def cpus_wanted(config: Config) -> float:
    """What a run takes of the machine where Ray is started for it."""
    scaling, reference = config.scaling, config.reference
    needed = config.needs_reference and reference.place == "actors"
    replicas = (reference.least_replicas if needed else 0) + (config.train.eval_place == "actors")
    trains = scaling.max_workers * scaling.cpus_per_worker + replicas * reference.cpus_per_replica
    return max(trains, config.evaluation.cpus_per_actor, config.pairs.cpus_per_actor) + 1


def train(config: Config, watcher: Watcher | None = None, stop: Stop | None = None) -> Result:
    """Trains from preference pairs to an exported model; given again, it goes on where the run stands.

    Args:
        config: The run.
        watcher: Told what happens; None for silence.
        stop: Who may ask the run to stop; None: signals alone.

    Raises:
        UserError: A mistake in configuration, data or storage, with one clear message.
        FinalError: Anything else that would fail again.
        StoppedError: It was asked to stop.
    """
    watcher, stop = watcher or Watcher(), stop or Stop()
    if config.sft.epochs is None:
        return _train_run(config, watcher, stop)
    follows = config.after_start()
    check_reachable(follows)
    if finished := _as_it_stands(follows, watcher):
        return finished
    # Ray on this machine shall have room for both.
    start_ray(follows)
    make_start(config, watcher)
    return _train_run(follows, watcher, stop)


def make_start(config: Config, watcher: Watcher | None = None) -> Result:
    """The start by likelihood that `sft` asks for, as a run of its own.

    Raises:
        ConfigError: What follows it has begun already, and with another start.
    """
    watcher = watcher or Watcher()
    follows, start = config.after_start(), config.start()
    check_reachable(follows)
    _refuse_changed_config(follows)
    if manifest.newest(follows.run_uri) is not None and finished_run(start, evaluated=False) is None:
        raise ConfigError(
            f"{follows.run_uri} has begun with the model of {start.run_uri}, which is not there any more as it was: "
            "restore it, or choose another name for a new run"
        )
    watcher.phase("the start: likelihood of the chosen answers")
    return _train_run(start, watcher, Stop())


def _train_run(config: Config, watcher: Watcher, stop: Stop) -> Result:
    with Gauges(config, watcher) as watcher, warnings_to(watcher.warning):
        check_trackers(config)
        check_optimizer(config.optimizer)
        check_reachable(config)
        if finished := _as_it_stands(config, watcher):
            return finished
        check_trainable(config.model.path)
        check_quantize(config.adapter.quantize, config.model.path)
        watcher.phase("looking at the pairs")
        found = survey(config, watcher)
        with RunLease(config.run_uri, watcher.phase) as lease:
            # Another driver may have begun or ended the run since we looked.
            if finished := _as_it_stands(config, watcher):
                return finished
            with _on_record(config.run_uri, lease.generation, watcher):
                return _train(config, watcher, found, lease, stop)


@contextlib.contextmanager
def _on_record(run_uri: str, generation: int, watcher: Watcher) -> Iterator[None]:
    """Records how the driver ended, and writes the run's report."""
    try:
        yield
    except LeaseLostError:
        raise  # The run is another driver's.
    except Exception as error:
        _record(run_uri, generation, error, watcher)
        raise
    _record(run_uri, generation, None, watcher)


def _record(run_uri: str, generation: int, error: Exception | None, watcher: Watcher) -> None:
    """Does what no run may fail for."""
    try:
        with storage.patience(RECORD_PATIENCE_S):
            write_outcome(run_uri, generation, error)
            write_report(run_uri)
    except Exception as problem:
        watcher.warning(f"the run's report could not be written: {first_line(problem)}")


def _as_it_stands(config: Config, watcher: Watcher) -> Result | None:
    """The result of a run that is finished; None for one to begin or to go on with.

    Raises:
        ConfigError: It has a different configuration.
    """
    _refuse_changed_config(config)
    finished = finished_run(config)
    if finished is not None:
        watcher.phase(f"{config.run_uri} is finished: nothing to do")
    return finished


def _train(config: Config, watcher: Watcher, found: Survey, lease: RunLease, stop: Stop) -> Result:
    start_ray(config)
    ensure_resources(config, references=False)
    if found.made is None:
        ensure_resources(config, workers=False, references=False, tokenizing=True)
    filler: ReferenceFiller | MovingFiller | None = None
    evaluator: Evaluator | None = None
    try:
        pairs = prepare(config, watcher, found)
        there = {chunk.source for chunk in pairs.eval}
        for number, held in enumerate(config.data.eval_sets if config.train.eval_every_steps else ()):
            if number not in there:
                raise ConfigError(
                    f"train.eval_every_steps is set, but of {pairs.counts['rows']} rows none was held out"
                    f"{f' for the set {held} of data.eval' if held else ''}: raise data.eval_fraction, name files with "
                    "pairs in data.eval, or set train.eval_every_steps: null"
                )
        plan = make_plan(config, pairs)
        lease.check()
        _refuse_other_pairs(config, pairs)
        weights = _weights(config)
        _refuse_other_weights(config, weights)
        _write_config(config, plan, pairs, weights)
        newest = manifest.newest(config.run_uri)
        position = newest[1].state.step if newest else 0
        reference = open_reference_store(config, pairs.uri) if config.needs_reference else None
        if plan.weights:
            watcher.phase(_mixture(config, plan))
        watcher.planned(plan, position)
        if reference is not None:
            note_use(reference, config.run_uri, pairs.uri)
            if config.reference.place != "adapter_off":
                filler = _filler(config, pairs, plan, reference, lease.generation, position)
        places = Places(
            pairs.uri,
            reference.uri if reference else None,
            Costs(*relative_costs(config.model.path)),
            error_place(config.run_uri, lease.generation),
        )
        if config.train.eval_place == "actors":
            evaluator = Evaluator(config, places, plan.total_steps)
            evaluator.start()

        def trained() -> bool:
            return finished_run(config, evaluated=False) is not None

        supervise(config, places, lease, watcher, filler, evaluator, trained, stop)
        if evaluator is not None:
            _record_evaluations(config, plan.total_steps, watcher)
            write_card(config, plan.total_steps)
    except Exception as error:
        if filler is not None:
            filler.check()  # A filler that has stopped is why the stream has.
        with final_errors():
            raise error from None
    finally:
        if filler is not None:
            filler.stop()
        if evaluator is not None:
            evaluator.stop()
    result = finished_run(config)
    assert result is not None
    return result


def _mixture(config: Config, plan: Plan) -> str:
    """What an epoch takes from each source, for people to read."""
    parts = []
    for number, name in enumerate(sorted(config.data.train)):
        there = sum(chunk.num_pairs for chunk in plan.chunks if chunk.source == number)
        parts.append(f"{plan.pairs_of_source(number):,} pairs from the {there:,} of {name}")
    return "an epoch takes " + ", ".join(parts)


def _filler(
    config: Config, pairs: PairStore, plan: Plan, reference: ReferenceStore, generation: int, position: int
) -> ReferenceFiller | MovingFiller:
    """Who has pairs scored beside training; it has begun.

    Raises:
        ConfigError: There is no room, or nothing may be scored.
    """
    family = storage.fingerprint(config.run_uri)
    if config.reference.sync_steps:
        if config.reference.sync_steps >= plan.total_steps:
            log.warning(
                "reference.sync_steps is %d and training ends after %d steps: the reference never moves",
                config.reference.sync_steps,
                plan.total_steps,
            )
        ensure_resources(config)
        return MovingFiller(config, pairs, plan, reference, family, generation)
    order = chunks_in_order_of_need(config, plan, pairs, position)
    filler = ReferenceFiller(config, pairs, order, reference, family, generation, position)
    # Workers find their room first.
    filler.workers_wait(False)
    if filler.missing and config.reference.place == "store_only":
        raise ConfigError(
            f"reference.place is store_only, but {len(filler.missing)} of {len(order)} chunks have no scores "
            f"in {reference.uri}: run `dpo-ray reference` first, or set reference.place: actors"
        )
    ensure_resources(config, references=bool(filler.missing))
    filler.start()
    return filler


@contextlib.contextmanager
def final_errors() -> Iterator[None]:
    """Raises the error that would come again in place of what Ray has wrapped around it."""
    try:
        yield
    except Exception as error:
        if final := final_error(error):
            raise final from None
        raise


@dataclass(frozen=True, slots=True)
class _AfterTraining:
    """What the driver records with when no worker is left; see `Recording`."""

    attempt: Attempt
    publish: Callable[[dict[str, Any]], None]
    fence: Callable[[], None]
    total_steps: int
    group: int = 1


def _record_evaluations(config: Config, total_steps: int, watcher: Watcher) -> None:
    """Records the evaluations that came after the workers had ended, and removes the checkpoints that waited."""
    attempt, newest = read_attempts(config.run_uri)[-1], manifest.newest(config.run_uri)
    assert newest is not None
    fence = Fence(config.run_uri, attempt).check
    # As an attempt that begins where all is trained.
    after = replace(attempt, position=newest[1].state.step)
    with Recorder(config, _AfterTraining(after, watcher.line, fence, total_steps)) as recorder:
        recorder.flush()
        try:
            manifest.prune(config.run_uri, config.train.keep_checkpoints, attempt.attempt, needed=recorder.needs)
        except (StorageError, OSError) as error:  # All is done: old ones are nothing to fail for.
            log.warning("old checkpoints were not removed: %s", error)


def finished_run(config: Config, evaluated: bool = True) -> Result | None:
    """The result of a run that has nothing left to do, or None.

    Args:
        config: The run.
        evaluated: Whether all evaluations beside training have to be recorded too.
    """
    found, total = manifest.newest(config.run_uri), planned_steps(config)
    export_uri = storage.join(config.run_uri, "export")
    if found is None or total is None:
        return None
    exported = storage.join(export_uri, "exported.json")
    step = found[1].state.step
    there = storage.read_json(exported) if storage.exists(exported) else {}
    if step < total or there.get("step") != step or there.get("merged", True) != config.adapter.merge:
        return None
    lines = storage.read_json_lines(storage.join(config.run_uri, "metrics.jsonl"))
    steps = [line for line in lines if "loss" in line] or [{}]
    held_out = [line for line in lines if "eval_loss" in line]
    if evaluated and config.train.eval_place == "actors":
        kept = map(manifest.step_of, manifest.committed(config.run_uri))
        due = {step for step in kept if evaluations.is_due(config.train, step, total)}
        if due - {line["step"] for line in held_out}:
            return None
    filled = storage.join(config.run_uri, "reference.json")
    reference: dict[str, float] = {}
    if config.needs_reference and storage.exists(filled):
        total_s, waited_s = (sum(line.get(f"perf/{name}", 0.0) for line in steps) for name in _STEP_SECONDS)
        reference = {**storage.read_json(filled), "waited_share": waited_s / max(1e-9, total_s)}
    last = max(held_out, key=lambda line: line["step"], default={})
    return Result(config.run_uri, export_uri, step, steps[-1], last, reference)


def planned_steps(config: Config) -> int | None:
    """Optimizer steps at which a run ends; None before its pairs have been prepared."""
    described = storage.join(config.run_uri, "config.yaml")
    if not storage.exists(described):
        return None
    per_epoch: int = yaml.safe_load(storage.read_bytes(described))["about"]["steps_per_epoch"]
    return total_steps(per_epoch, config.train.epochs, config.train.max_steps)


def _write_config(config: Config, plan: Plan, pairs: PairStore, weights: dict[str, str]) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("dpo_ray", "torch", "transformers", "ray")}
    about = {"versions": versions, "pairs": pairs.uri, "steps_per_epoch": plan.steps_per_epoch, "counts": pairs.counts}
    about["code"], about["revision"], about["weights"] = _code(config), _revision(), weights
    described = {"config": config.model_dump(mode="json"), "about": about}
    text = yaml.safe_dump(described, sort_keys=False, allow_unicode=True)
    storage.write_bytes(storage.join(config.run_uri, "config.yaml"), text.encode())


def _revision() -> str | None:
    """The commit of this package where it runs from its own repository, with `-dirty` where files differ from it."""
    folder = os.path.dirname(os.path.dirname(__file__))
    git = ["git", "-C", folder]
    try:
        # An installed package may lie within somebody else's repository.
        for command in (
            ["ls-files", "--error-unmatch", "__init__.py"],
            ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        ):
            done = subprocess.run([*git, *command], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _code(config: Config) -> dict[str, str]:
    """Digests of what the run uses of the user's own code."""
    return {name: code_digest(name) for name in config.own_code}


def _weights(config: Config) -> dict[str, str]:
    """Digests, by path, of the models that are read again when the run goes on: no checkpoint holds them."""
    paths = {config.reference_path} if config.needs_reference and config.reference.sync_steps is None else set()
    if config.adapter.rank is not None:
        paths.add(config.model.path)
    return {path: weights_digest(path, storage.join(config.store_uri, "digests")) for path in sorted(paths)}


def _refuse_other_weights(config: Config, weights: dict[str, str]) -> None:
    """Refuses to go on, in the middle of a training, with another reference, or below the adapter another model.

    Raises:
        ConfigError: The files at a model's path have changed.
    """
    place = storage.join(config.run_uri, "config.yaml")
    if manifest.newest(config.run_uri) is None or not storage.exists(place):
        return
    before = yaml.safe_load(storage.read_bytes(place))["about"].get("weights", {})
    for path in sorted(weights):
        if before.get(path, weights[path]) != weights[path]:
            raise ConfigError(
                f"{path}: its weights are others than when {config.run_uri} began; going on would not be the same "
                "training. Put them back as they were, or choose another name for a new run"
            )


def _refuse_other_pairs(config: Config, pairs: PairStore) -> None:
    """Refuses to go on, in the middle of one order of pairs, with another.

    Raises:
        ConfigError: The data, or what makes pairs of them, have changed.
    """
    place = storage.join(config.run_uri, "config.yaml")
    if manifest.newest(config.run_uri) is None or not storage.exists(place):
        return
    before = yaml.safe_load(storage.read_bytes(place))["about"]["pairs"]
    if storage.name_of(before) == storage.name_of(pairs.uri):
        return
    # Another version of this package may name the same pairs otherwise.
    known = open_store(storage.join(config.store_uri, "pairs", storage.name_of(before)))
    weighted = config.data.weight_column is not None or config.data.margin_column is not None
    if known is None or _contents(known, weighted) != _contents(pairs, weighted):
        raise ConfigError(
            f"{config.run_uri} was trained on the pairs in {before}, which are not those that the data give now: "
            "files, tokenizer, or the code that reads them, have changed. Put them back as they were, or choose "
            "another name for a new run"
        )


def _contents(pairs: PairStore, with_numbers: bool) -> list[str]:
    """What is trained on, in store order: tokens, and weights and margins where there are any."""
    return [chunk.sha256 if with_numbers else chunk.key for chunk in pairs.train]


def _refuse_changed_config(config: Config) -> None:
    place = storage.join(config.run_uri, "config.yaml")
    if not storage.exists(place) or manifest.newest(config.run_uri) is None:
        return
    stored = yaml.safe_load(storage.read_bytes(place))
    changed = changed_keys(stored["config"], config)
    before, now = stored["about"].get("code", {}), _code(config)
    changed += [f"{name}: its code has changed" for name in now if before.get(name, now[name]) != now[name]]
    if changed:
        raise ConfigError(
            f"{config.run_uri} is a run with a different configuration; going on would not be the same training:\n  "
            + "\n  ".join(changed)
            + "\nChange them back, or choose another name"
        )
