"""Standard benchmarks of several models, by lm-evaluation-harness through its own command (extra `lm-eval`)."""

from __future__ import annotations

import glob
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.errors import ConfigError
from dpo_ray.evaluation.statistics import Estimate, known_estimate
from dpo_ray.extensions import check_installed
from dpo_ray.model.files import load_tokenizer, localize
from dpo_ray.model.weights import weights_digest
from dpo_ray.orchestration.answers_job import Model
from dpo_ray.orchestration.resources import check_actor_room
from dpo_ray.orchestration.trainer import start_ray
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.pairs.tokenize import tokenizer_digest

# Of what the command said, when it failed.
SHOWN_CHARS = 2000


def check_benchmarks(config: Config) -> None:
    """Refuses benchmarks without their package.

    Raises:
        ConfigError: It is missing; the message says how to install it.
    """
    if config.evaluation.lm_eval:
        check_installed("lm_eval", "lm-eval", f"evaluation.lm_eval is {config.evaluation.lm_eval}")


def benchmarks_of(config: Config, models: Sequence[Model], watcher: Watcher) -> dict[str, dict[str, Estimate]]:
    """What each model reaches, as `<run>/evaluation/benchmarks/<fingerprint>.json` keeps it.

    Args:
        config: `evaluation.lm_eval` are the command's arguments.
        models: Which.
        watcher: Told what happens.

    Returns:
        By benchmark and model, with the interval of a normal distribution of the harness' standard error.

    Raises:
        ConfigError: The command fails: its last words.
    """
    places = {model.name: _place(config, model) for model in models}
    missing = [model for model in models if not storage.exists(places[model.name])]
    if missing:
        start_ray(config)
        options = config.evaluation
        check_actor_room("evaluation", options.cpus_per_actor, options.gpus_per_actor, watcher)
        task = ray.remote(_run).options(num_cpus=options.cpus_per_actor, num_gpus=options.gpus_per_actor)
        waiting, failed = {task.remote(config, model): model for model in missing}, ""
        while waiting:
            watcher.progress("running benchmarks (models)", len(missing) - len(waiting), len(missing))
            (done, *_), _ = ray.wait(list(waiting))
            model, found = waiting.pop(done), ray.get(done)
            if isinstance(found, str):
                failed = f"evaluation.lm_eval: the command failed for {model.name}, {model.path}:\n{found}"
            else:
                storage.write_json(places[model.name], found)
        if failed:
            raise ConfigError(failed)
    scores = dict[str, dict[str, Estimate]]()
    for model in models:
        for name, each in scores_of(storage.read_json(places[model.name])).items():
            scores.setdefault(name, {})[model.name] = each
    return scores


def scores_of(results: Mapping[str, Any]) -> dict[str, Estimate]:
    """The numbers of a file of results.

    Args:
        results: As the harness writes them: `results` has by task "metric,filter" and "metric_stderr,filter".

    Returns:
        By task, metric and filter. The interval is empty where there is no standard error.
    """
    found = dict[str, Estimate]()
    for task, numbers in results["results"].items():
        num = int(results.get("n-samples", {}).get(task, {}).get("effective", 0))
        for key, value in numbers.items():
            metric, separator, kind = key.partition(",")
            is_number = isinstance(value, int | float) and math.isfinite(value)
            if not separator or metric.endswith("_stderr") or not is_number:
                continue
            error = numbers.get(f"{metric}_stderr,{kind}")
            name = f"{task} {metric}" + ("" if kind == "none" else f" ({kind})")
            known = float(error) if isinstance(error, int | float) else float("nan")
            found[name] = known_estimate(float(value), known, num)
    return found


def _place(config: Config, model: Model) -> str:
    about = {
        "format": 1,
        "harness": importlib.metadata.version("lm_eval"),
        "arguments": config.evaluation.lm_eval,
        "model": weights_digest(model.path, storage.join(config.store_uri, "digests")),
        "tokenizer": tokenizer_digest(load_tokenizer(model.tokenizer)),
        "dtype": config.model.compute_dtype,
    }
    return storage.join(config.run_uri, "evaluation", "benchmarks", f"{storage.fingerprint(about)}.json")


def _run(config: Config, model: Model) -> dict[str, Any] | str:
    """Results of a model, or what the command said last before it failed."""
    options = config.evaluation
    arguments = {
        "pretrained": localize(model.path),
        "tokenizer": localize(model.tokenizer, weights=False),
        "dtype": config.model.compute_dtype,
    }
    with tempfile.TemporaryDirectory(prefix="dpo_ray-benchmarks-") as folder:
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", *options.lm_eval]
        command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
        command += ["--device", "cuda" if options.gpus_per_actor else "cpu", "--output_path", folder]
        threads = {"OMP_NUM_THREADS": f"{max(1, int(options.cpus_per_actor))}"}
        ended = subprocess.run(command, env=os.environ | threads, text=True, capture_output=True, check=False)
        files = glob.glob(os.path.join(glob.escape(folder), "**", "results_*.json"), recursive=True)
        if ended.returncode or not files:
            return (ended.stdout + ended.stderr)[-SHOWN_CHARS:].strip()
        with open(files[0], encoding="utf-8") as file:
            found: dict[str, Any] = json.load(file)
        return {name: found[name] for name in ("results", "n-samples", "versions", "n-shot") if name in found}
