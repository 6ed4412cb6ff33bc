"""`dpo-ray demo`: the whole way on one machine, with data, tokenizer and model of its own.

A tiny Llama gets its start by likelihood on the chosen answers, then DPO. To compare, the untrained model gets the same
DPO: it learns to tell pairs apart, and not to answer. All are the same jobs as on a cluster.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from dpo_ray.config import Config, parse_config
from dpo_ray.demo_data import all_requests, byte_tokenizer, follows_rule, make_pairs, tiny_llama_config
from dpo_ray.display import ProgressBar
from dpo_ray.errors import ConfigError
from dpo_ray.orchestration.trainer import Result, make_start, train

NUM_PAIRS, NUM_HELD_OUT = 3000, 300
GOAL_ACCURACY = 0.9
SHOWN_PROMPTS = 3
START, ALIGNED, ALONE = "start", "start, DPO", "DPO alone"
# What may be removed has it.
MARK = ".dpo-ray-demo"
ROWS = {
    "accuracy of the implicit reward": ("eval_rewards/accuracies", ".3f"),
    "margin of the implicit reward": ("eval_rewards/margins", ".3f"),
    "log-probability of chosen": ("eval_logps/chosen", ".2f"),
    "log-probability of rejected": ("eval_logps/rejected", ".2f"),
}


def run_demo(folder: str, console: Console) -> bool:
    """Runs the demo anew.

    Args:
        folder: Where runs and stores go: empty, not there yet, or an earlier demo's, which is removed.
        console: Where to write.

    Raises:
        ConfigError: There is something else in it.

    Returns:
        Whether held-out accuracy after DPO reached the goal, and answers follow the rule more often than after the
        start or after DPO alone.
    """
    disable_progress_bar()
    folder = os.path.abspath(folder)
    _make_room(folder)
    _write_inputs(folder)
    whole = _config(folder, "dpo", sft={"epochs": 3, "max_steps": 200, "learning_rate": 3e-3})
    alone = _config(folder, "dpo-alone")
    runs: dict[str, Result] = {}
    for name, title, run, config in (
        (START, "1/3 dpo-ray sft", make_start, whole),
        (ALIGNED, "2/3 dpo-ray train: DPO from there, 2 FSDP workers, 1 reference actor", train, whole),
        (ALONE, "3/3 dpo-ray train without sft: DPO alone", train, alone),
    ):
        with ProgressBar(console) as watcher:
            watcher.phase(title)
            runs[name] = run(config, watcher)
    prompts = [request.prompt for request in all_requests(held_out=True)]
    answers = {name: answer(result.export_uri, prompts) for name, result in runs.items()}
    rates = {name: sum(map(follows_rule, prompts, texts)) / len(prompts) for name, texts in answers.items()}
    console.print(_table(runs, rates))
    console.print(_answers(prompts, answers))
    console.print(f"model    {runs[ALIGNED].export_uri}\nmetrics  {runs[ALIGNED].run_uri}/metrics.jsonl")
    console.print(f"curves   tensorboard --logdir {folder}")
    accuracy, failures = runs[ALIGNED].eval_metrics["eval_rewards/accuracies"], []
    if accuracy < GOAL_ACCURACY:
        failures.append(f"held-out accuracy {accuracy:.3f} is below {GOAL_ACCURACY}")
    if rates[ALIGNED] <= max(rates[START], rates[ALONE]):
        failures.append("answers follow the rule no more often than without DPO, or without the start")
    for failure in failures:
        console.print(f"[red]{failure}[/red]")
    return not failures


def _config(folder: str, name: str, **sections: dict[str, Any]) -> Config:
    return parse_config(
        {
            "name": name,
            "storage_path": folder,
            "model": {"path": f"{folder}/model", "compute_dtype": "float32"},
            "data": {"train": [f"{folder}/pairs/train.jsonl"], "eval": [f"{folder}/pairs/held-out.jsonl"]},
            "objective": {"beta": 1.0},
            "optimizer": {"learning_rate": 5e-5, "warmup_steps": 10},
            "train": {
                "global_batch_pairs": 32,
                "epochs": 3,
                "max_steps": 94,
                "eval_every_steps": 100,
                "checkpoint_every_steps": 100,
            },
            "scaling": {"workers": 2},
            **sections,
        }
    )


def _make_room(folder: str) -> None:
    mark = f"{folder}/{MARK}"
    if os.path.exists(mark):
        shutil.rmtree(folder)
    elif os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise ConfigError(f"{folder} is not empty and no earlier demo's: give another folder, or empty it")
    os.makedirs(folder, exist_ok=True)
    with open(mark, "w", encoding="utf-8") as file:
        file.write("Made by `dpo-ray demo`, which removes this folder when it is run again.\n")


def _write_inputs(folder: str) -> None:
    os.makedirs(f"{folder}/pairs")
    for name, held_out, num in (("train", False, NUM_PAIRS), ("held-out", True, NUM_HELD_OUT)):
        with open(f"{folder}/pairs/{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in make_pairs(num, seed=0, held_out=held_out))
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama_config(len(tokenizer))).save_pretrained(f"{folder}/model")
    tokenizer.save_pretrained(f"{folder}/model")


def _table(runs: dict[str, Result], rates: dict[str, float]) -> Table:
    table = Table(title="held-out pairs")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    for title, (key, form) in ROWS.items():
        # The start has no reference, and looks at chosen answers alone.
        values = [result.eval_metrics.get(key) for result in runs.values()]
        table.add_row(title, *("" if value is None else format(value, form) for value in values))
    table.add_row("answers that follow the rule", *(f"{rate:.3f}" for rate in rates.values()))
    return table


def _answers(prompts: list[str], answers: dict[str, list[str]]) -> Table:
    table = Table(title="greedy answers")
    for column in ("prompt", *answers):
        table.add_column(column)
    for index in range(0, len(prompts), len(prompts) // SHOWN_PROMPTS)[:SHOWN_PROMPTS]:
        # What an untrained model says may be anything.
        table.add_row(prompts[index], *(Text(repr(texts[index])) for texts in answers.values()))
    return table


@torch.inference_mode()
def answer(path: str, prompts: list[str]) -> list[str]:
    """Greedy answers of an exported model, in plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    generated = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=48,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    new_tokens = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
