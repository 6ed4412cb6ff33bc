"""The model card: what the run's folder tells of the model in its export. The same folder gives the same card."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.objective.losses import loss_named

_HELD_OUT = {
    "rewards/accuracies": "accuracy of the implicit reward",
    "rewards/margins": "reward margin, nats",
    "loss": "loss",
    "logps/chosen_change": "log-probability of chosen answers, policy less reference, nats",
    "logps/rejected_change": "the same of rejected answers",
}
_COUNTS = {
    "rows": "rows read",
    "pairs": "pairs to train on",
    "eval_pairs": "held-out pairs",
    "duplicates": "duplicates, left out",
    "identical": "pairs with equal answers, left out",
    "tied": "ties, left out",
    "rejects": "rejects",
}


def write_card(config: Config, step: int) -> None:
    """Writes the card of a run's export anew.

    Raises:
        StorageError: The run cannot be read, or the card not be written.
    """
    storage.write_bytes(storage.join(config.run_uri, "export", "README.md"), model_card(config, step).encode())


def model_card(config: Config, step: int) -> str:
    """The card of the model after so many steps, with what is on record of it in the run's folder."""
    described = storage.join(config.run_uri, "config.yaml")
    about: dict[str, Any] = yaml.safe_load(storage.read_bytes(described))["about"] if storage.exists(described) else {}
    summary_uri = storage.join(config.run_uri, "evaluation", "summary.json")
    summary: dict[str, Any] = storage.read_json(summary_uri) if storage.exists(summary_uri) else {}
    lines = storage.read_json_lines(storage.join(config.run_uri, "metrics.jsonl"))
    held_out = [line for line in lines if "eval_loss" in line and line["step"] <= step]
    evaluation: dict[str, Any] = max(held_out, key=lambda line: line["step"], default={})
    if summary.get("step") != step:
        summary = {}
    # The export of a start by likelihood is a folder of that run's.
    start = f"{config.name}-sft" if config.sft.epochs else os.path.basename(config.model.path.rstrip("/"))
    parts = [
        f"# {config.name}",
        f"Trained with dpo_ray from `{start}` by {_method(config)}.",
        _table(_training(config, step, lines)),
        "## Data\n\n" + _table(_data(config, about.get("counts", {}))),
        *_results(summary, evaluation),
        "## Again\n\n" + _again(config, about),
    ]
    current = evaluation if evaluation.get("step") == step else {}
    return f"---\n{_metadata(config, summary, current)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _method(config: Config) -> str:
    return "the likelihood of the chosen answers" if config.objective.chosen_only else "preference optimization"


def _metadata(config: Config, summary: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """What the Hub and peft read."""
    alone = config.adapter.rank is not None and not config.adapter.merge
    # hf://datasets/OWNER/NAME/...
    hub = [entry.split("/") for _, entry in config.data.sources if entry.startswith("hf://datasets/")]
    datasets = list(dict.fromkeys("/".join(each[3:5]).partition("@")[0] for each in hub if len(each) > 4))
    metrics = {name: each["value"] for name, each in summary["held_out"]["metrics"].items()} if summary else evaluation
    prefix = "" if summary else "eval_"
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=datasets[0] if len(datasets) == 1 else "preference-pairs",
            dataset_name="held-out pairs",
            metric_type=kind,
            metric_name=_HELD_OUT[name],
            metric_value=float(f"{metrics[prefix + name]:.6g}"),
        )
        for name, kind in (("rewards/accuracies", "accuracy"), ("rewards/margins", "reward_margin"), ("loss", "loss"))
        if prefix + name in metrics
    ]
    found = ModelCardData(
        library_name="peft" if alone else "transformers",
        base_model=config.model.path if alone else None,
        datasets=datasets or None,
        pipeline_tag="text-generation",
        tags=["sft" if config.objective.chosen_only else "dpo", "dpo_ray"],
        model_name=config.name if results else None,
        eval_results=results or None,
    )
    return found.to_yaml().rstrip()


def _training(config: Config, step: int, lines: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    objective, adapter, optimizer, model = config.objective, config.adapter, config.optimizer, config.model
    if adapter.rank is not None:
        where = adapter.target_modules if isinstance(adapter.target_modules, str) else ", ".join(adapter.target_modules)
        here = "merged into the weights" if adapter.merge else "here, without the model"
        beside = f", trained beside weights in {adapter.quantize}" if adapter.quantize else ""
        scale = f"alpha {adapter.alpha:g}{' over the root of the rank' if adapter.rslora else ''}"
        kind = "DoRA" if adapter.dora else "LoRA"
        yield f"{kind} adapter", f"rank {adapter.rank}, {scale}, on {where}{beside}; {here}"
    losses = [name if share == 1 else f"{share:g} {name}" for name, share in objective.shares.items()]
    used = sorted(frozenset.union(*(loss_named(name).parameters for name in objective.shares)))
    hyperparameters = [f"{name.replace('_', ' ')} {getattr(objective, name):g}" for name in used]
    if objective.f_divergence != "reverse_kl":
        hyperparameters.append(f"divergence {objective.f_divergence} {objective.f_alpha or ''}".rstrip())
    if objective.ld_alpha != 1.0:
        hyperparameters.append(f"LD-DPO alpha {objective.ld_alpha:g}")
    if objective.weighting:
        hyperparameters.append("WPO's weights")
    yield "objective", ", ".join([" + ".join(losses), *hyperparameters])
    if config.needs_reference:
        moves = f", moved every {config.reference.sync_steps} steps" if config.reference.sync_steps else ""
        own = "the start" if config.reference_path == model.path else f"`{config.reference_path}`"
        yield "reference", f"{own}, in {config.reference_dtype}{moves}"
    warmup = f"{optimizer.warmup_steps:.0%} of all steps"
    if optimizer.warmup_steps >= 1 or not optimizer.warmup_steps:
        warmup = f"{optimizer.warmup_steps} steps"
    rate = f"learning rate {optimizer.learning_rate:g}, {optimizer.schedule}, warm-up {warmup}"
    yield "optimizer", f"{optimizer.name}, {rate}"
    yield "pairs per step", f"{config.train.global_batch_pairs}"
    yield "steps", f"{step}"
    if epochs := next((line["epoch"] for line in reversed(lines) if "epoch" in line), None):
        yield "epochs", f"{epochs:.4g}"
    yield "max_length", f"{config.data.max_length}"
    yield "weights, compute", f"{model.weights_dtype}, {model.compute_dtype}"
    yield "seed", f"{config.seed}"
    yield from _hardware(config, lines)


def _hardware(config: Config, lines: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    attempts = storage.read_json_lines(storage.join(config.run_uri, "attempts.jsonl"))
    sizes = sorted({each["world_size"] for each in attempts})
    budget = storage.join(config.run_uri, "budget.json")
    devices = storage.read_json(budget)["valid_for"]["devices"] if storage.exists(budget) else []
    if sizes:
        shown = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        yield "workers", shown + (f" ({', '.join(devices)})" if devices else "")
    seconds = math.fsum(line.get("perf/step_s", 0.0) for line in lines)
    if seconds:
        yield "time of all steps", f"{seconds / 3600:.4g} h"


def _data(config: Config, counts: Mapping[str, int]) -> Iterable[tuple[str, str]]:
    weights: Mapping[str, float] = config.data.train if isinstance(config.data.train, dict) else {}
    names = config.data.eval_sets
    for part, entry in config.data.sources:
        kind, _, number = part.partition(".")
        if kind == "train":
            yield "source", f"`{entry}`" + (f", weight {weights[entry]:g}" if weights else "")
        else:
            yield f"held-out set {names[int(number)]}" if number else "held out", f"`{entry}`"
    if config.data.eval_fraction:
        yield "held out", f"{config.data.eval_fraction:.3g} of the pairs, by content"
    for name, shown in _COUNTS.items():
        if counts.get(name) or name in ("rows", "pairs") and name in counts:
            yield shown, f"{counts[name]:,}"


def _results(summary: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Iterable[str]:
    """By `dpo-ray evaluate` where there is such an evaluation of the model, else by the last one of training."""
    if summary:
        held_out, answers = summary["held_out"], summary["answers"]
        rows = [
            (shown, _interval(held_out["metrics"][name]))
            for name, shown in _HELD_OUT.items()
            if name in held_out["metrics"]
        ]
        text = f"## Results\n\nOn {held_out['pairs']:,} held-out pairs, with 95 % intervals:\n\n{_table(rows)}"
        if answers:
            rows = [
                (f"KL to the reference, nats an answer ({name})", _interval(each))
                for name, each in answers["kl"].items()
            ]
            for name, each in answers["win_rates"].items():
                rows.append((f"win rate against {_named(name)}", _interval(each["rate"])))
                rows.append(("length-controlled", _interval(each["length_controlled"])))
            rows += [
                (f"tokens of an answer of {_named(name)}", _interval(each)) for name, each in answers["tokens"].items()
            ]
            text += f"\n\nOn answers to {answers['prompts']:,} held-out prompts:\n\n{_table(rows)}"
        if summary.get("benchmarks"):
            rows = [
                (f"{benchmark}, {_named(model)}", _interval(each))
                for benchmark, of_models in summary["benchmarks"].items()
                for model, each in of_models.items()
            ]
            text += f"\n\nOn standard benchmarks:\n\n{_table(rows)}"
        yield text + "".join(f"\n\n**Note:** {warning}" for warning in summary["warnings"])
    elif evaluation:
        rows = [
            (shown, f"{evaluation[f'eval_{name}']:.4g}")
            for name, shown in _HELD_OUT.items()
            if f"eval_{name}" in evaluation
        ]
        yield f"## Results\n\nOn the held-out pairs after step {evaluation['step']}:\n\n{_table(rows)}"


def _named(model: str) -> str:
    """Of a further model, whose name is its place, the end; of a run's export the run too."""
    *_, before, last = ["", *model.rstrip("/").split("/")]
    return f"{before}/{last}" if last == "export" else last


def _interval(estimate: Mapping[str, Any]) -> str:
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    return f"{value:.4g}" if low is None or high is None else f"{value:.4g} ({low:.4g} to {high:.4g})"


def _again(config: Config, about: Mapping[str, Any]) -> str:
    """How to make the model again: what was set, and by which code."""
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude={"storage_path", "evaluation"})
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip()
    versions = [f"{name} {version}" for name, version in (about.get("versions") or {}).items()]
    versions += [f"revision {about['revision']}"] if about.get("revision") else []
    versions += [f"`{name}` SHA-256 {digest}" for name, digest in (about.get("code") or {}).items()]
    made = f"\n\nMade with {', '.join(versions)}." if versions else ""
    return (
        f"```yaml\n{text}\n```\n\nwith this as `run.yaml`: `dpo-ray train run.yaml --set storage_path=runs`. The same "
        f"pairs in the same order come from the same data, tokenizer and seed.{made}"
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|")

    return "\n".join(["| | |", "| --- | --- |", *(f"| {cell(name)} | {cell(value)} |" for name, value in rows)])
