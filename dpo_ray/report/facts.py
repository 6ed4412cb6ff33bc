"""What a run's folder tells: reads its files, and nothing else. Needs neither Ray nor torch."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import yaml

from dpo_ray import storage
from dpo_ray.errors import ConfigError, DataError, first_line
from dpo_ray.lease import last_holder
from dpo_ray.pairs.plan import total_steps
from dpo_ray.pairs.statistics import Statistics, describe
from dpo_ray.pairs.store import PairStore, open_store
from dpo_ray.redaction import shown
from dpo_ray.report.charts import Interval
from dpo_ray.training import manifest, outcome
from dpo_ray.training.attempts import read_attempts
from dpo_ray.training.faults import read_faults

# A chunk is a random sample of the pairs: so many say enough of their lengths.
CHUNKS_READ = 8
# Prompts whose answers are shown.
SHOWN_PROMPTS = 12
# A fall of the chosen answers' log-probability by less than this share of it is not worth a warning.
FALL_TOLD = 0.01

State = Literal["finished", "failed", "stopped", "running", "dead", "unknown"]


@dataclass(frozen=True, slots=True)
class Status:
    """Where a run stands.

    Attributes:
        state: In one word.
        text: In one sentence.
        message: The whole message of what ended it; may be long.
        error: Its class.
        ended: When, as far as that is on record.
    """

    state: State
    text: str
    message: str = ""
    error: str = ""
    ended: datetime.datetime | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """Lines of metrics, by column.

    Attributes:
        step: Shape (L,), int64.
        values: By name, shape (L,), float64; NaN where a line has no such number.
    """

    step: np.ndarray
    values: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.step)

    def get(self, name: str) -> np.ndarray:
        """A column, shape (L,); NaN where there is none."""
        return self.values.get(name, np.full(len(self.step), math.nan))

    def at(self, name: str, line: int) -> float | None:
        """One finite number, or None."""
        value = float(self.get(name)[line]) if len(self.step) else math.nan
        return value if math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class AttemptFacts:
    """One start of the worker group.

    Attributes:
        attempt: Its number.
        generation: Of the driver's lease.
        position: Steps done before it.
        checkpoint: What it began with.
        world_size: Policy workers.
        reason: Why it was started.
        began: When.
        steps: Steps that no later attempt has done again.
        steps_s: Seconds that these took.
    """

    attempt: int
    generation: int
    position: int
    checkpoint: str | None
    world_size: int
    reason: str
    began: datetime.datetime | None
    steps: int
    steps_s: float


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out metrics of one set of pairs, before and after.

    Attributes:
        name: Of the set; empty for all held-out pairs.
        first_step: Of the first evaluation.
        last_step: Of the last.
        rows: Metric -> at the start (None: not known), at the first evaluation, at the last.
    """

    name: str
    first_step: int
    last_step: int
    rows: dict[str, tuple[float | None, float | None, float | None]]


@dataclass(frozen=True, slots=True)
class ChosenLogps:
    """What became of the log-probability of chosen answers, in nats per answer.

    Attributes:
        before: At the start, or as early as it is known.
        after: At the end.
        of: Which pairs, and when.
    """

    before: float
    after: float
    of: str

    @property
    def falls(self) -> bool:
        """Whether it fell by enough to tell."""
        return self.after < self.before - FALL_TOLD * abs(self.before)


@dataclass(frozen=True, slots=True)
class DataFacts:
    """The pairs of a run.

    Attributes:
        store_uri: Their store.
        counts: What became of the rows, see `store.COUNTS`.
        tokens: In the store; None where that is gone.
        chunks: Chunks in the store.
        sampled: How many of them `statistics` is of.
        statistics: Of these; its counts are of all pairs, its rejects of the whole store or of a sample of their
            own. None where the store is gone or damaged.
        problem: Why there are none.
    """

    store_uri: str
    counts: dict[str, int]
    tokens: int | None = None
    chunks: int = 0
    sampled: int = 0
    statistics: Statistics | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Answers of several models to a prompt.

    Attributes:
        prompt: Its turns.
        answers: Model -> its answer; the policy first, then the reference.
        outcomes: What was compared -> 1 where the first one's won, 0.5 for a tie, 0; None without a verdict.
    """

    prompt: tuple[Mapping[str, str], ...]
    answers: dict[str, str]
    outcomes: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What `dpo-ray evaluate` found of a run's model, as runs are compared by it.

    Attributes:
        kl: Its KL divergence to the reference (k3), nats an answer, on answers that it gave.
        accuracy: Share of held-out pairs.
        margin: Of log-ratios to the reference, chosen less rejected, nats: a reward margin over beta, which runs of
            different beta can be compared by.
    """

    kl: Interval
    accuracy: Interval
    margin: Interval


@dataclass(frozen=True, slots=True)
class Facts:
    """What a run's folder tells.

    Attributes:
        run_uri: The folder.
        name: The run's.
        status: Where it stands.
        config: Its configuration as plain data; empty where it failed before that was written.
        about: What `config.yaml` says besides.
        steps: Training steps.
        evaluations: Held-out evaluations.
        total_steps: Where the run ends; None where that is not known.
        pairs_trained: Pairs of all steps.
        attempts: The starts of worker groups, oldest first.
        faults: Those that ended no attempt: when, and what happened.
        set_aside: Checkpoints that failed verification: name and reason.
        hangs: Files with the stacks of groups that stood still.
        data: Its pairs; None where none were prepared.
        held_out: Before and after, of all held-out pairs first, then of each set that has a name.
        chosen: What became of the chosen answers; None where that is not measured.
        evaluation: What `dpo-ray evaluate` found, as its `summary.json` has it; empty without it.
        side_by_side: The first answers that it had models give.
    """

    run_uri: str
    name: str
    status: Status
    config: dict[str, Any]
    about: dict[str, Any]
    steps: Columns
    evaluations: Columns
    total_steps: int | None
    pairs_trained: int
    attempts: tuple[AttemptFacts, ...]
    faults: tuple[tuple[datetime.datetime | None, str], ...]
    set_aside: tuple[tuple[str, str], ...]
    hangs: tuple[str, ...]
    data: DataFacts | None
    held_out: tuple[HeldOut, ...] = field(default=())
    chosen: ChosenLogps | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    side_by_side: tuple[SideBySide, ...] = field(default=())

    @property
    def num_steps(self) -> int:
        """Steps done."""
        return int(self.steps.step[-1]) if len(self.steps) else 0

    @property
    def evaluated(self) -> Evaluated | None:
        """What it can be compared with others by; None where the model as it is has not been evaluated."""
        return evaluated_of(self.evaluation, self.config["objective"]["beta"], self.num_steps) if self.config else None

    @property
    def steps_s(self) -> float:
        """Seconds of all steps, with everything between them."""
        return float(np.nansum(self.steps.get("perf/step_s")))

    @property
    def pairs_per_s(self) -> float | None:
        """Pairs a second of these."""
        return self.pairs_trained / self.steps_s if self.pairs_trained and self.steps_s else None

    @property
    def began(self) -> datetime.datetime | None:
        """When the first worker group was started."""
        return self.attempts[0].began if self.attempts else None

    @property
    def wall_s(self) -> float | None:
        """Seconds from there to the end, where that is on record."""
        if self.began is None or self.status.ended is None:
            return None
        return max(0.0, (self.status.ended - self.began).total_seconds())


def read_facts(run_uri: str) -> Facts:
    """Reads a run's folder; the run may go on meanwhile.

    Raises:
        ConfigError: There is no run.
        DataError: A file is damaged.
        StorageError: A file cannot be read.
    """
    described = _optional(storage.join(run_uri, "config.yaml"))
    past, ended = read_attempts(run_uri), outcome.read_outcome(run_uri)
    if described is None and not past and ended is None:
        raise ConfigError(f"{run_uri}: no run is there; give a run's folder, <storage_path>/<name>")
    try:
        stored = yaml.safe_load(described) if described else {}
    except yaml.YAMLError as error:
        raise DataError(f"{storage.join(run_uri, 'config.yaml')}: damaged: {first_line(error)}") from None
    if not isinstance(stored, dict):
        raise DataError(f"{storage.join(run_uri, 'config.yaml')}: not what a run writes there")
    config, about = stored.get("config") or {}, stored.get("about") or {}
    lines = storage.read_json_lines(storage.join(run_uri, "metrics.jsonl"))
    steps = columns([line for line in lines if "loss" in line])
    evaluations = columns([line for line in lines if "eval_loss" in line])
    ledger = storage.read_json_lines(storage.join(run_uri, "ledger.jsonl"))
    planned = None
    if config and "steps_per_epoch" in about:
        train = config["train"]
        planned = total_steps(int(about["steps_per_epoch"]), train["epochs"], train["max_steps"])
    facts = Facts(
        run_uri=run_uri,
        name=str(config.get("name") or storage.name_of(run_uri)),
        status=_status(run_uri, ended, int(steps.step[-1]) if len(steps) else 0, planned),
        config=config,
        about=about,
        steps=steps,
        evaluations=evaluations,
        total_steps=planned,
        pairs_trained=sum(int(line.get("num_pairs", 0)) for line in ledger),
        attempts=tuple(_attempts(past, ledger, steps)),
        faults=tuple((_time(each.time), shown(each.reason)) for each in read_faults(run_uri)),
        set_aside=tuple(manifest.set_aside_records(run_uri)),
        hangs=tuple(storage.list_names(storage.join(run_uri, "hangs"))),
        data=_data(about) if about.get("pairs") else None,
        **_evaluation(run_uri),
    )
    held_out = _held_out(facts)
    return replace(facts, held_out=held_out, chosen=_chosen(held_out, steps))


def evaluated_of(summary: Mapping[str, Any], beta: float, step: int) -> Evaluated | None:
    """What runs are compared by; None where answers of the model after so many steps have not been sampled.

    Args:
        summary: As `summary.json` has it; empty without one.
        beta: The run's.
        step: Optimizer steps done.
    """
    if summary.get("step") != step or "k3" not in ((summary.get("answers") or {}).get("kl") or {}):
        return None
    metrics, kl = summary["held_out"]["metrics"], summary["answers"]["kl"]["k3"]
    accuracy, margin = metrics["rewards/accuracies"], metrics["rewards/margins"]
    return Evaluated(*(_interval(each, unit) for each, unit in ((kl, 1.0), (accuracy, 1.0), (margin, beta))))


def columns(lines: Sequence[Mapping[str, Any]]) -> Columns:
    """Lines of metrics as columns; what is no number is left out."""
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    values = {name: np.array([_number(line.get(name)) for line in lines], np.float64) for name in names}
    return Columns(
        np.array([line["step"] for line in lines], np.int64),
        {name: each for name, each in values.items() if not np.isnan(each).all()},
    )


def eval_prefixes(names: Iterable[str]) -> dict[str, str]:
    """Of an evaluation's metrics: name of each held-out set -> prefix of its metrics; all pairs are the set ''."""
    found = [name for name in names if name.startswith("eval_") and name.endswith("_loss") and name != "eval_loss"]
    sets = [name.removeprefix("eval_").removesuffix("_loss") for name in found]
    return {"": "eval_"} | {name: f"eval_{name}_" for name in sets}


def step_parts(facts: Facts) -> dict[str, np.ndarray]:
    """Where the seconds of each step went, the largest part first: name -> shape (steps,).

    Evaluation and checkpoint after a step count in the next one, as in `perf/step_s`. Older runs have not measured
    them apart from computing.
    """
    steps, evaluations = facts.steps, facts.evaluations
    whole = np.nan_to_num(steps.get("perf/step_s"))
    data, reference = (np.nan_to_num(steps.get(f"perf/{name}_wait_s")) for name in ("data", "reference"))
    between = np.nan_to_num(steps.get("perf/between_steps_s"))
    seconds = dict(zip(evaluations.step.tolist(), evaluations.get("eval_perf/seconds").tolist(), strict=True))
    evaluating = np.nan_to_num(np.array([seconds.get(step - 1, 0.0) for step in steps.step.tolist()], np.float64))
    evaluating = np.minimum(evaluating, between)
    if (facts.config.get("train") or {}).get("eval_place") == "actors":
        evaluating = np.zeros_like(between)  # Beside training.
    apart = "perf/between_steps_s" in steps.values
    parts = {
        "computing" if apart else "computing, evaluation, checkpoint": np.maximum(0.0, whole - data - between),
        "waiting for data": np.maximum(0.0, data - reference),
        "waiting for the reference": reference,
        "evaluation": evaluating,
        "checkpoint": between - evaluating,
    }
    return {name: each for name, each in parts.items() if each.any()}


def _interval(estimate: Mapping[str, Any], unit: float) -> Interval:
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    # Without ends where there are none.
    return Interval(*((value if end is None else end) / unit for end in (value, low, high)))


def _optional(uri: str) -> bytes | None:
    return storage.read_bytes(uri) if storage.exists(uri) else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _status(run_uri: str, ended: outcome.Outcome | None, steps: int, total: int | None) -> Status:
    holder = last_holder(run_uri)
    reached = f"{steps:,} of {total:,} steps" if total is not None else f"{steps:,} steps"
    when = _time(ended.time) if ended is not None else None
    if ended is not None and (holder is None or ended.generation >= holder.generation):
        message = shown(ended.message)
        if ended.outcome == outcome.FINISHED:
            return Status("finished", f"{reached}; the model is exported", ended=when)
        first = message.partition("\n")[0] or ended.error
        if ended.outcome == outcome.STOPPED:
            return Status("stopped", first, message, ended=when)
        return Status("failed", first, message, ended.error, when)
    exported = storage.join(run_uri, "export", "exported.json")
    if holder is not None and holder.state == "gone":
        return Status("dead", f"{holder.who} is gone, after {reached}; the same command goes on from there")
    if holder is not None and holder.state == "held":
        return Status("running", f"{reached}; {holder.who} holds the run, unless it died")
    if total is not None and steps >= total and storage.exists(exported):
        return Status("finished", f"{reached}; the model is exported")
    return Status("unknown", f"{reached}; how it ended is not on record")


def _time(text: str) -> datetime.datetime | None:
    try:
        found = datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)


def _attempts(past: Sequence[Any], ledger: Sequence[Mapping[str, Any]], steps: Columns) -> Iterable[AttemptFacts]:
    of_step = {line["step"]: line.get("attempt") for line in ledger}
    owner = np.array([of_step.get(step, -1) for step in steps.step.tolist()], np.int64)
    seconds = np.nan_to_num(steps.get("perf/step_s"))
    for each in past:
        own = owner == each.attempt
        yield AttemptFacts(
            attempt=each.attempt,
            generation=each.generation,
            position=each.position,
            checkpoint=each.checkpoint,
            world_size=each.world_size,
            reason=shown(each.reason),
            began=_time(each.time),
            steps=int(own.sum()),
            steps_s=float(seconds[own].sum()),
        )


def _data(about: Mapping[str, Any]) -> DataFacts:
    uri, counts = str(about["pairs"]), dict(about.get("counts") or {})
    try:
        store = open_store(uri)
    except DataError as error:
        return DataFacts(shown(uri), counts, problem=shown(f"{error}"))
    if store is None:
        return DataFacts(shown(uri), counts, problem="the pair store is not there any more")
    chunks = [*store.train, *store.eval]
    some = [chunks[number] for number in sorted({len(chunks) * at // CHUNKS_READ for at in range(CHUNKS_READ)})]
    try:
        statistics, problem = describe(PairStore(store.uri, tuple(some), (), store.counts)), ""
    except (DataError, FileNotFoundError) as error:
        statistics, problem = None, shown(f"{error}")
    tokens = sum(chunk.num_tokens for chunk in chunks)
    return DataFacts(shown(uri), store.counts, tokens, len(chunks), len(some), statistics, problem)


def _evaluation(run_uri: str) -> dict[str, Any]:
    folder = storage.join(run_uri, "evaluation")
    summary = _optional(storage.join(folder, "summary.json"))
    if summary is None:
        return {}
    found = json.loads(summary)
    lines = storage.read_json_lines(storage.join(folder, "side_by_side.jsonl")) if found["answers"] else []
    shown_lines = [
        SideBySide(tuple(line["prompt"]), line["answers"], line["outcomes"]) for line in lines[:SHOWN_PROMPTS]
    ]
    return {"evaluation": found, "side_by_side": tuple(shown_lines)}


def _starts_as_reference(config: Mapping[str, Any]) -> bool:
    """Whether rewards are beta times the log-ratio to the policy's own start."""
    return not any(config.get("reference", {}).get(key) for key in ("path", "sync_steps"))


def _held_out(facts: Facts) -> tuple[HeldOut, ...]:
    found, held = list[HeldOut](), facts.evaluations
    if not len(held):
        return ()
    beta = facts.config.get("objective", {}).get("beta")
    for name, prefix in eval_prefixes(held.values).items():
        rows = dict[str, tuple[float | None, float | None, float | None]]()
        for metric in ("rewards/accuracies", "rewards/margins", "loss", "logps/chosen", "logps/rejected"):
            first, last = (held.at(f"{prefix}{metric}", line) for line in (0, -1))
            if last is None:
                continue
            before = None
            reward = held.at(f"{prefix}{metric.replace('logps', 'rewards')}", -1)
            if beta and reward is not None and _starts_as_reference(facts.config):
                if metric == "rewards/margins":
                    before = 0.0
                elif metric.startswith("logps"):
                    before = last - reward / beta
            rows[metric] = (before, first, last)
        found.append(HeldOut(name, int(held.step[0]), int(held.step[-1]), rows))
    return tuple(found)


def _chosen(held_out: Sequence[HeldOut], steps: Columns) -> ChosenLogps | None:
    for held in held_out[:1]:
        before, first, last = held.rows.get("logps/chosen", (None, None, None))
        if before is not None and last is not None:
            return ChosenLogps(before, last, "held-out pairs, before training and after the last evaluation")
        if first is not None and last is not None and held.first_step < held.last_step:
            return ChosenLogps(first, last, f"held-out pairs, after steps {held.first_step:,} and {held.last_step:,}")
    values = steps.get("logps/chosen")
    tenth = len(values) // 10
    if not tenth or np.isnan(values).any():
        return None
    return ChosenLogps(
        float(values[:tenth].mean()), float(values[-tenth:].mean()), "training pairs, first and last tenth of the steps"
    )
