"""Answers are drawn from the model's own distribution, and end where it or its template ends a turn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from dpo_ray.demo_data import byte_tokenizer, tiny_llama_config
from dpo_ray.errors import ConfigError
from dpo_ray.model.sample import RewardModel, Sampled, Sampler, Template

OTHER_END = 65


def sampler(folder: Path, **settings: object) -> Sampler:
    """Of the same tiny model, with settings of generation of its own."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = tiny_llama_config(len(tokenizer), hidden_size=32, num_heads=2)
    config.initializer_range = 0.1
    model = LlamaForCausalLM(config)
    model.generation_config.update(eos_token_id=OTHER_END, **settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    template = Template(AutoTokenizer.from_pretrained(folder), {})
    options = {"max_new_tokens": 40, "temperature": 1.0, "top_p": 1.0}
    return Sampler(str(folder), template, "float32", torch.device("cpu"), options)


def test_what_a_model_s_settings_say_changes_no_answer(tmp_path: Path) -> None:
    prompts = [[{"role": "user", "content": f"Say {number}."}] for number in range(4)]
    plain = sampler(tmp_path / "plain").sampled(prompts, seed=1)
    penalised = sampler(tmp_path / "penalised", do_sample=True, repetition_penalty=5.0, min_p=0.5, top_k=2).sampled(
        prompts, seed=1
    )
    for (one,), (other,) in zip(plain, penalised, strict=True):
        assert np.array_equal(one.tokens, other.tokens)


def test_an_answer_ends_with_the_model_s_end_or_the_template_s(tmp_path: Path) -> None:
    made = sampler(tmp_path / "model")
    end = made._template.tokenizer.eos_token_id
    assert end != OTHER_END
    nothing = np.zeros(0, np.int64)
    for tokens, kept, ended in (([70, end, 71], 2, True), ([70, OTHER_END, 71], 2, True), ([70, 71], 2, False)):
        found = made._answer(nothing, np.array(tokens))
        assert (len(found.tokens), found.ended) == (kept, ended)


@pytest.mark.parametrize(("kind", "positions"), [("bert", 30), ("roberta", 28), ("llama", None)])
def test_a_judge_reads_no_more_than_it_has_positions_for(tmp_path: Path, kind: str, positions: int | None) -> None:
    """RoBERTa's first position comes after that of padding, which is 1 here; rotary positions have no end."""
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": 30, "pad_token_id": 1, "num_labels": 1}
    config = AutoConfig.for_model(kind, **sizes, **options)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    judge, nothing = RewardModel(str(tmp_path), "float32", torch.device("cpu")), np.zeros(0, np.int32)
    prompt = [{"role": "user", "content": "a" * 20}]

    def tokens(size: int) -> list[float]:
        return judge.scores(prompt, [Sampled("b" * (size - 20), nothing, nothing)])

    assert len(tokens(positions or 30)) == 1
    if positions is None:
        assert len(tokens(60)) == 1
        return
    with pytest.raises(
        ConfigError, match=rf"has positions for {positions} tokens, .* have {positions + 1}: name a judge"
    ):
        tokens(positions + 1)
