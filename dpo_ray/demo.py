"""`dpo-ray demo`: the whole way on one machine, with data, tokenizer and model of its own.

A tiny Llama gets its start by likelihood on the chosen answers, then DPO; both are the same job as on a cluster.
"""

from __future__ import annotations

import json
import os
import shutil

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from dpo_ray.config import Config, parse_config
from dpo_ray.demo_data import all_requests, byte_tokenizer, follows_rule, make_pairs, tiny_llama_config
from dpo_ray.display import ProgressBar
from dpo_ray.orchestration.trainer import Result, train

NUM_PAIRS, NUM_HELD_OUT = 3000, 300
GOAL_ACCURACY = 0.9
SHOWN_PROMPTS = 3


def run_demo(folder: str, console: Console) -> bool:
    """Runs the demo anew.

    Args:
        folder: Where runs and stores go; what an earlier demo left there is removed.
        console: Where to write.

    Returns:
        Whether held-out accuracy after DPO reached the goal.
    """
    disable_progress_bar()
    shutil.rmtree(folder, ignore_errors=True)
    folder = os.path.abspath(folder)
    _write_inputs(folder)
    with ProgressBar(console) as watcher:
        watcher.phase("1/2 the start: likelihood of the chosen answers")
        started = train(_config(folder, "start", "sft"), watcher)
    with ProgressBar(console) as watcher:
        watcher.phase("2/2 DPO: 2 FSDP workers, 1 reference actor")
        aligned = train(_config(folder, "dpo", "sigmoid"), watcher)
    accuracy = aligned.eval_metrics["eval_rewards/accuracies"]
    console.print(_table(started, aligned))
    console.print(_answers(started, aligned))
    console.print(f"model    {aligned.export_uri}\nmetrics  {aligned.run_uri}/metrics.jsonl")
    console.print(f"curves   tensorboard --logdir {folder}")
    if accuracy < GOAL_ACCURACY:
        console.print(f"[red]held-out accuracy {accuracy:.3f} is below {GOAL_ACCURACY}[/red]")
    return accuracy >= GOAL_ACCURACY


def _config(folder: str, name: str, loss: str) -> Config:
    first = loss == "sft"
    steps = 200 if first else 94
    return parse_config(
        {
            "name": name,
            "storage_path": folder,
            "model": {"path": f"{folder}/model" if first else f"{folder}/start/export", "compute_dtype": "float32"},
            "data": {"train": [f"{folder}/pairs/train.jsonl"], "eval": [f"{folder}/pairs/held-out.jsonl"]},
            "objective": {"loss": loss, "beta": 1.0},
            "optimizer": {
                "learning_rate": 3e-3 if first else 5e-5,
                "betas": [0.9, 0.98] if first else [0.9, 0.999],
                "schedule": "linear",
                "warmup_steps": 10,
            },
            "train": {
                "global_batch_pairs": 32,
                "epochs": 3,
                "max_steps": steps,
                "eval_every_steps": steps // 2,
                "checkpoint_every_steps": steps // 2,
            },
            "scaling": {"workers": 2},
        }
    )


def _write_inputs(folder: str) -> None:
    os.makedirs(f"{folder}/pairs")
    for name, held_out, num in (("train", False, NUM_PAIRS), ("held-out", True, NUM_HELD_OUT)):
        with open(f"{folder}/pairs/{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in make_pairs(num, seed=0, held_out=held_out))
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama_config(len(tokenizer))).save_pretrained(f"{folder}/model")
    tokenizer.save_pretrained(f"{folder}/model")


def _table(started: Result, aligned: Result) -> Table:
    table = Table(title="held-out pairs")
    for column, justify in (("", "left"), ("before DPO", "right"), ("after DPO", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    before, after = started.eval_metrics, aligned.eval_metrics
    # Before DPO the policy is its own reference: no margin, and so no pair told apart.
    table.add_row("accuracy of the implicit reward", "0.000", f"{after['eval_rewards/accuracies']:.3f}")
    table.add_row("margin of the implicit reward", "0.000", f"{after['eval_rewards/margins']:.3f}")
    for name in ("chosen", "rejected"):
        key = f"eval_logps/{name}"
        table.add_row(f"log-probability of {name}", f"{before[key]:.2f}", f"{after[key]:.2f}")
    prompts = sorted({request.prompt for request in all_requests(held_out=True)})
    rates = [
        sum(map(follows_rule, prompts, answer(result.export_uri, prompts))) / len(prompts)
        for result in (started, aligned)
    ]
    table.add_row(f"answers that follow the rule ({len(prompts)} prompts)", *(f"{rate:.3f}" for rate in rates))
    return table


def _answers(started: Result, aligned: Result) -> Table:
    requests = all_requests(held_out=True)
    prompts = [request.prompt for request in requests[:: len(requests) // SHOWN_PROMPTS]][:SHOWN_PROMPTS]
    table = Table(title="greedy answers")
    for column in ("prompt", "before DPO", "after DPO"):
        table.add_column(column)
    before, after = answer(started.export_uri, prompts), answer(aligned.export_uri, prompts)
    for row in zip(prompts, before, after, strict=True):
        table.add_row(*row)
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
