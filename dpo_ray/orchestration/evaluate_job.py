"""`dpo-ray evaluate`: a finished run's model against its reference.

The policy's export is scored on the held-out pairs as the reference is, by replicas, into a store of its own: what is
scored already is found there, and the same command goes on where it stood.
"""

from __future__ import annotations

import itertools
import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from dpo_ray import storage
from dpo_ray.config import AdapterConfig, Config, changed_keys, load_config
from dpo_ray.errors import ComparisonError, ConfigError, DataError
from dpo_ray.evaluation.held_out import HeldOut, evaluate_pairs, warnings_of
from dpo_ray.evaluation.judge import EndpointJudge, Question
from dpo_ray.evaluation.statistics import (
    Comparison,
    Estimate,
    Ranking,
    WinRate,
    mean_estimate,
    rank,
    share_estimate,
    win_rate,
)
from dpo_ray.model.card import write_card
from dpo_ray.orchestration.answers_job import Model, Prompt, answers_of, held_out_prompts, rewards_of
from dpo_ray.orchestration.benchmarks_job import benchmarks_of, check_benchmarks
from dpo_ray.orchestration.originals import Originals
from dpo_ray.orchestration.reference_filler import LOOK_S, ReferenceFiller, open_reference_store
from dpo_ray.orchestration.resources import ensure_resources
from dpo_ray.orchestration.trainer import final_errors, start_ray
from dpo_ray.orchestration.watch import Watcher, warnings_to
from dpo_ray.pairs.store import PairStore, open_store
from dpo_ray.reference.store import ReferenceStore
from dpo_ray.reference.usage import note_use
from dpo_ray.report.page import write_report
from dpo_ray.training.kept import read_run

POLICY, REFERENCE = "policy", "reference"


@dataclass(frozen=True, slots=True)
class Answers:
    """What sampled answers say.

    Attributes:
        prompts: How many were answered.
        tokens: By model, tokens of an answer.
        ended: By model, the share of answers that came to an end within `evaluation.max_new_tokens`.
        kl: The policy's KL divergence to the reference, nats an answer, by estimator: `k1` and `k3`; empty where
            answers were not drawn from the policy as it is.
        win_rates: The policy against each of the others; empty without a judge. Length is in characters.
        ranking: Of three models or more.
        open: Comparisons that the judge gave no verdict of.
        disagreed: Comparisons that the judge decided otherwise in the other order, counted as ties.
    """

    prompts: int
    tokens: dict[str, Estimate]
    ended: dict[str, Estimate]
    kl: dict[str, Estimate]
    win_rates: dict[str, WinRate]
    ranking: Ranking | None
    open: int
    disagreed: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found, as `<run>/evaluation/summary.json` has it.

    Attributes:
        run_uri: The run.
        step: Optimizer steps of the policy's.
        policy: Its place.
        reference: The reference's.
        held_out: On held-out pairs.
        answers: On answers to held-out prompts; None without them.
        benchmarks: Of `evaluation.lm_eval`, by benchmark and model.
        warnings: What its owner should know.
    """

    run_uri: str
    step: int
    policy: str
    reference: str
    held_out: HeldOut
    answers: Answers | None
    benchmarks: dict[str, dict[str, Estimate]]
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class Run:
    """A run that has an export.

    Attributes:
        config: Its configuration.
        pairs: Its pair store.
        export_uri: The policy.
        step: Its optimizer steps.
    """

    config: Config
    pairs: PairStore
    export_uri: str
    step: int


def open_run(target: str, overrides: Sequence[str] | None = None) -> Run:
    """The run that a URI or a configuration names.

    Args:
        target: `<storage_path>/<name>`, or a YAML file.
        overrides: As for `load_config`.

    Raises:
        ConfigError: It has no export to evaluate yet, or none that can be; or the configuration is not the run's.
        DataError: There is no such run, or nothing is held out.
    """
    given = load_config(target, list(overrides or [])) if target.endswith((".yaml", ".yml")) else None
    run_uri = given.run_uri if given else target.rstrip("/")
    config, stored, about = read_run(run_uri, () if given else overrides or ())
    if given is not None:
        # With a start by likelihood the run's model is that start.
        expected = given if given.sft.epochs is None else given.after_start()
        changed = changed_keys(stored, expected)
        config = expected
    else:
        changed = changed_keys(stored, config)
    if changed:
        raise ConfigError(f"{run_uri} is a run with a different configuration:\n  " + "\n  ".join(changed))
    export_uri = storage.join(run_uri, "export")
    exported = storage.join(export_uri, "exported.json")
    if not storage.exists(exported):
        raise ConfigError(
            f"{run_uri} has no export yet, which is what is evaluated: `dpo-ray train` makes it at its end"
        )
    there = storage.read_json(exported)
    if not there["merged"]:
        raise ConfigError(
            f"{export_uri} is an adapter alone, and a whole model is evaluated: run `dpo-ray train` again with --set "
            "adapter.merge=true, which only exports"
        )
    pairs = open_store(storage.join(config.store_uri, "pairs", storage.name_of(about["pairs"])))
    if pairs is None:
        raise DataError(f"{about['pairs']}: the run's pair store is gone: run `dpo-ray prepare` to make it again")
    if not pairs.eval:
        raise DataError(
            f"{run_uri} has no held-out pairs: nothing can be said of pairs that it was trained on; set data.eval or "
            "data.eval_fraction for the next run"
        )
    return Run(config, pairs, export_uri, there["step"])


def evaluate(
    target: str,
    overrides: Sequence[str] | None = None,
    watcher: Watcher | None = None,
    judge: EndpointJudge | None = None,
) -> Evaluation:
    """Evaluates a run's export; writes `<run>/evaluation/summary.json`, the run's report and the export's model card.

    Args:
        target: The run's URI, or its configuration.
        overrides: Each `section.key=value`.
        watcher: Told what happens; None for silence.
        judge: One that is shared with other evaluations, and with it what it may cost; None: one is made.

    Raises:
        UserError: See `open_run`.
        ReferenceFillError: Pairs could not be scored.
        JudgeError: The judge does not answer, or may not be asked any more.
        ActorsLostError: Actors that answer died too often.
    """
    watcher = watcher or Watcher()
    run = open_run(target, overrides)
    config, warnings = run.config, list[str]()
    # A key that is not there is better known before anything is computed.
    judge = judge or judge_of(config)
    check_benchmarks(config)
    with warnings_to(watcher.warning), final_errors():
        columns = dict[str, dict[bytes, str | float | None]]()
        if by := config.evaluation.group_columns:
            start_ray(_scoring(config, run.export_uri))
            columns = Originals(config, run.pairs.uri).columns(run.pairs, by, watcher)
        policy = _score(run, run.export_uri, "the policy", watcher)
        reference = _score(run, config.reference_path, "the reference", watcher)
        held_out = evaluate_pairs(
            config,
            run.pairs,
            policy,
            reference,
            lambda done, total: watcher.progress("reading scores", done, total),
            columns,
        )
        warnings += warnings_of(held_out)
        about = config.run_uri, run.step, run.export_uri, config.reference_path
        found = Evaluation(*about, held_out, None, {}, warnings)
        # What comes next takes long, and may fail. What an earlier command has found besides is not given up for it.
        if not storage.exists(_summary_uri(run)):
            _write(run, found)
        if config.evaluation.prompts:
            found = replace(found, answers=_answers(run, judge, warnings, watcher))
        _write(run, found)
        if config.evaluation.lm_eval:
            found = replace(found, benchmarks=benchmarks_of(config, _models(run), watcher))
            _write(run, found)
    return found


def _write(run: Run, found: Evaluation) -> None:
    # Groups have an order that is not their names'.
    text = json.dumps(as_json(found), indent=1)
    storage.write_bytes(_summary_uri(run), f"{text}\n".encode())
    write_card(run.config, run.step)
    write_report(run.config.run_uri)


def _summary_uri(run: Run) -> str:
    return storage.join(run.config.run_uri, "evaluation", "summary.json")


def judge_of(config: Config) -> EndpointJudge | None:
    """The judge behind an endpoint that the configuration names, if it does.

    Raises:
        ConfigError: Its key is not in the environment.
    """
    if config.evaluation.judge != "endpoint":
        return None
    return EndpointJudge(config.evaluation, storage.join(config.store_uri, "judgements"))


def _models(run: Run) -> list[Model]:
    config, options = run.config, run.config.evaluation
    tokenizer = config.tokenizer_path
    return [
        Model(POLICY, run.export_uri, tokenizer, config.reference_path if options.samples_are_plain else None),
        Model(REFERENCE, config.reference_path, tokenizer),
        *(Model(path, path, path) for path in options.models),
    ]


def _answers(run: Run, judge: EndpointJudge | None, warnings: list[str], watcher: Watcher) -> Answers:
    """Has all models answer, and their answers judged."""
    config, options = run.config, run.config.evaluation
    models, drawn = _models(run), options.samples_are_plain
    start_ray(config)
    prompts = held_out_prompts(config, run.pairs, watcher)
    lines = answers_of(config, prompts, models, watcher)
    texts = np.array([[line["answer"] for line in each] for each in lines], dtype=object)
    outcomes, disagreed = dict[tuple[int, int], list[float | None]](), 0
    pairs = list(itertools.combinations(range(len(models)), 2))
    if options.judge == "reward_model":
        rewards = rewards_of(config, prompts, lines, watcher)
        outcomes = {
            (one, two): [
                float(np.sign(gap) + 1) / 2 if np.isfinite(gap) else None for gap in rewards[one] - rewards[two]
            ]
            for one, two in pairs
        }
    elif judge is not None:
        questions = [
            Question(prompt.text, texts[one, index], texts[two, index])
            for one, two in pairs
            for index, prompt in enumerate(prompts)
        ]
        judged = judge.judge(questions, lambda done, total: watcher.progress("asking the judge", done, total))
        disagreed = judged.disagreed
        outcomes = {pair: judged.outcomes[at * len(prompts) : (at + 1) * len(prompts)] for at, pair in enumerate(pairs)}
    names, seed = [model.name for model in models], config.seed
    _write_side_by_side(run, prompts, names, texts, outcomes)
    still_open = sum(each is None for every in outcomes.values() for each in every)
    if still_open:
        warnings.append(f"the judge gave no verdict of {still_open:,} comparisons, which are left out; ask again")
    sizes = np.vectorize(len)(texts)
    kl = {
        name: mean_estimate(np.array([line[f"kl_{name}"] for line in lines[0]]), seed)
        for name in (("k1", "k3") if drawn else ())
    }
    return Answers(
        prompts=len(prompts),
        tokens={
            name: mean_estimate(np.array([line["tokens"] for line in each]), seed)
            for name, each in zip(names, lines, strict=True)
        },
        ended={
            name: share_estimate(np.array([line["ended"] for line in each]))
            for name, each in zip(names, lines, strict=True)
        },
        kl=kl,
        win_rates=_win_rates(names, sizes, outcomes, seed),
        ranking=_ranking(config, names, outcomes, warnings) if outcomes and len(models) > 2 else None,
        open=still_open,
        disagreed=disagreed,
    )


def _win_rates(
    names: Sequence[str], sizes: np.ndarray, outcomes: Mapping[tuple[int, int], Sequence[float | None]], seed: int
) -> dict[str, WinRate]:
    """The policy against each of the others."""
    found = {}
    for (one, two), each in outcomes.items():
        known = [index for index, outcome in enumerate(each) if outcome is not None]
        if one == 0 and known:
            decided = np.array([each[index] for index in known], np.float64)
            found[names[two]] = win_rate(decided, (sizes[0] - sizes[two])[known].astype(np.float64), seed)
    return found


def _ranking(
    config: Config,
    names: Sequence[str],
    outcomes: Mapping[tuple[int, int], Sequence[float | None]],
    warnings: list[str],
) -> Ranking | None:
    comparisons = [
        Comparison(index, names[one], names[two], outcome)
        for (one, two), each in outcomes.items()
        for index, outcome in enumerate(each)
        if outcome is not None
    ]
    try:
        return rank(comparisons, config.evaluation.prior_std, config.seed) if comparisons else None
    except ComparisonError as error:
        warnings.append(f"no ranking: {error}")
        return None


def _write_side_by_side(
    run: Run,
    prompts: Sequence[Prompt],
    names: Sequence[str],
    texts: np.ndarray,
    outcomes: Mapping[tuple[int, int], Sequence[float | None]],
) -> None:
    """All answers to a prompt on a line, for people."""
    lines = [
        {
            "pair_id": prompt.pair_id,
            "prompt": prompt.turns,
            "answers": dict(zip(names, texts[:, index], strict=True)),
            "outcomes": {f"{names[one]} against {names[two]}": each[index] for (one, two), each in outcomes.items()},
        }
        for index, prompt in enumerate(prompts)
    ]
    storage.write_json_lines(storage.join(run.config.run_uri, "evaluation", "side_by_side.jsonl"), lines)


def as_json(found: Evaluation) -> dict[str, Any]:
    """The evaluation as plain data; null for ends of intervals that there are not."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return {name: plain(value) for name, value in asdict(found).items()}


def _score(run: Run, path: str, what: str, watcher: Watcher) -> ReferenceStore:
    """Has the held-out pairs scored by a model, as far as they are not.

    Raises:
        ConfigError: There is no room, or the reference cannot be scored apart from training.
    """
    config, chunks = run.config, run.pairs.eval
    store = open_reference_store(config, run.pairs.uri)
    if path == config.reference_path and not store.missing(chunks):
        return store
    if path == config.reference_path and config.adapter.quantize:
        raise ConfigError(
            f"adapter.quantize is {config.adapter.quantize}, so that the reference is the policy's quantized weights, "
            "and held-out pairs have no scores of it: let the run evaluate them itself (train.eval_every_steps)"
        )
    scoring = _scoring(config, path)
    store = open_reference_store(scoring, run.pairs.uri)
    note_use(store, config.run_uri, run.pairs.uri)
    if not store.missing(chunks):
        return store
    start_ray(scoring)
    ensure_resources(scoring, workers=False)
    filler = ReferenceFiller(scoring, run.pairs, chunks, store, f"evaluate-{uuid.uuid4().hex[:12]}")
    total = sum(chunk.num_pairs for chunk in filler.missing)
    filler.start()
    try:
        while filler.working():
            time.sleep(LOOK_S)
            watcher.progress(f"scoring with {what} (pairs)", max(0, total - filler.filled.left_pairs), total)
    finally:
        filler.stop()
    filler.check()
    return store


def _scoring(config: Config, path: str) -> Config:
    """The configuration with which replicas score with a model as the run's reference is scored."""
    options = {"path": path, "dtype": config.reference_dtype, "place": "actors", "columns": None, "sync_steps": None}
    return config.model_copy(
        update={
            # What a filler reports shall not be taken for training's.
            "name": f"{config.name}/evaluation",
            "reference": config.reference.model_copy(update=options),
            "adapter": AdapterConfig(),
        }
    )
