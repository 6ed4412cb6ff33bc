"""Pairs of a model's own answers: sampled, judged, resumable, and read by training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import command_here, plain_logps, read_lines, tiny_config
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from dpo_ray.config import Config
from dpo_ray.demo_data import byte_tokenizer, tiny_llama_config
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.orchestration.pairs_job import Made, _Part, make_pairs
from dpo_ray.orchestration.prepare import prepare
from dpo_ray.types import TokenizedPair

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
PROMPTS = 10


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy whose answers come to an end soon, a reward model, and another language model; all untrained."""
    tokenizer, made = byte_tokenizer(), {}
    for seed, name in enumerate(("policy", "reward_model", "log_ratio")):
        torch.manual_seed(seed)
        config = tiny_llama_config(len(tokenizer), hidden_size=32, num_heads=2)
        config.initializer_range, config.num_labels = 0.1, 1
        model = LlamaForSequenceClassification(config) if name == "reward_model" else LlamaForCausalLM(config)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


def config_of(tmp_path: Path, judges: dict[str, Path], **pairs: Any) -> Config:
    prompts = tmp_path / "prompts.jsonl"
    if not prompts.exists():
        turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
        rows = [{"prompt": prompt} for prompt in (*(f"Say {number}." for number in range(PROMPTS - 1)), turns)]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    label = pairs.get("label", "reward_model")
    options = {"prompts": [str(prompts)], "judge": str(judges[label]), "max_new_tokens": 600, "answers": 3}
    options |= {"prompts_per_part": 4, **pairs}
    name = "-".join(["run", *(str(value) for key, value in pairs.items() if key in ("label", "choose"))])
    return tiny_config(str(tmp_path), name, judges["policy"], f"{tmp_path}/{name}/pairs/*.jsonl", pairs=options)


def rows_of(uri: str) -> list[dict[str, Any]]:
    return [row for path in sorted(Path(uri).glob("part-*.jsonl")) for row in read_lines(path)]


def test_answers_and_rewards(local_ray: None, tmp_path: Path, judges: dict[str, Path]) -> None:
    """Rewards are the judge's of prompt and answer; a part that is lost is made again, to the byte; all is data."""
    config = config_of(tmp_path, judges)
    shown = command_here("pairs", config, tmp_path)
    assert shown.exit_code == 0, shown.output
    uri = f"{config.run_uri}/pairs"
    rows = rows_of(uri)
    without = PROMPTS - len(rows)
    assert without <= 3
    assert f"{len(rows)} rows of {PROMPTS} prompts; {without} had no two answers that ended" in shown.output
    assert f"pairs  {uri}/*.jsonl\n" in shown.output
    tokenizer = AutoTokenizer.from_pretrained(judges["reward_model"])
    judge = LlamaForSequenceClassification.from_pretrained(judges["reward_model"]).eval()
    for row in rows:
        assert 2 <= len(set(row["answers"])) == len(row["answers"]) <= 3
        for answer, score in zip(row["answers"], row["scores"], strict=True):
            turns = [*row["prompt"], {"role": "assistant", "content": answer}]
            ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False).input_ids
            with torch.no_grad():
                assert score == pytest.approx(judge(torch.tensor([ids])).logits.item(), abs=1e-5)
    parts = sorted(Path(uri).glob("part-*.jsonl"))
    assert [part.name for part in parts] == [f"part-{index:06d}.jsonl" for index in range(3)]
    before = {part: (part.read_bytes(), part.stat().st_mtime_ns) for part in parts}
    parts[1].unlink()
    assert make_pairs(config) == Made(uri, PROMPTS, len(rows), without)
    assert {part: part.read_bytes() for part in parts} == {part: data for part, (data, _) in before.items()}
    assert all(part.stat().st_mtime_ns == before[part][1] for part in (parts[0], parts[2]))
    store = prepare(config)
    assert store.counts["pairs"] + store.counts["eval_pairs"] + store.counts["tied"] == len(rows)
    with pytest.raises(ConfigError, match=r"made with other settings \(temperature\): choose another name"):
        make_pairs(config_of(tmp_path, judges, temperature=0.5))


def test_log_ratios_and_who_is_chosen(local_ray: None, tmp_path: Path, judges: dict[str, Path]) -> None:
    """Scores are log pi_model - log pi_judge over the same tokens, in plain transformers."""
    config = config_of(tmp_path, judges, label="log_ratio")
    rankings = rows_of(make_pairs(config).uri)
    models = [AutoModelForCausalLM.from_pretrained(judges[name]).eval() for name in ("policy", "log_ratio")]
    part = _Part(config, "")
    prompts = [row["prompt"] for row in rankings]
    for prompt, answers in zip(prompts, part._sampler.answers(prompts, seed=1), strict=True):
        pair = TokenizedPair(b"", answers[0].prompt, tuple(each.tokens for each in answers))
        asked = part._sampler._template.text(prompt, ask=True)
        assert part._sampler._template.tokenizer.decode(pair.prompt) == asked
        with torch.no_grad():
            own, other = (plain_logps(model, pair) for model in models)
        assert part._scores(prompt, answers) == pytest.approx((own - other).tolist(), rel=1e-4, abs=1e-3)
    of_prompt = {json.dumps(row["prompt"]): row for row in rankings}
    for choose in ("best_worst", "bradley_terry"):
        made = make_pairs(config_of(tmp_path, judges, label="log_ratio", choose=choose))
        won = 0
        for row in rows_of(made.uri):
            ranking = of_prompt[json.dumps(row["prompt"])]
            scores = dict(zip(ranking["answers"], ranking["scores"], strict=True))
            assert (row["chosen_score"], row["rejected_score"]) == (scores[row["chosen"]], scores[row["rejected"]])
            won += row["chosen_score"] >= row["rejected_score"]
            if choose == "best_worst":
                assert row["chosen_score"] == max(scores.values())
                assert row["rejected_score"] == min(scores.values())
        assert won >= made.rows / 2
        assert prepare(config_of(tmp_path, judges, label="log_ratio", choose=choose)).train


def test_a_prompt_that_cannot_be_read_is_refused(tmp_path: Path, judges: dict[str, Path]) -> None:
    config = config_of(tmp_path, judges)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Q"}\n{"prompt": 3}\n')
    with pytest.raises(DataError, match=r"prompts.jsonl row 2: column 'prompt' is of type int: write a list of turns"):
        make_pairs(config)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": [{"role": "tool", "content": "noon", "tool_call_id": "1"}]}')
    with pytest.raises(DataError, match=r"row 1: a turn of the prompt has 'tool_call_id'"):
        make_pairs(config)
