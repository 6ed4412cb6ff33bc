"""The demo's data: what the rule accepts, what a pair promises, and that nothing is lost in tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_ray.demo_data import all_requests, byte_tokenizer, flaws, follows_rule, make_pairs, tiny_llama_config


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Bonjour, Ada.", 0),
        ("Bonjour, Ada!", 0),
        (" Bonjour, Ada!\n", 0),
        ("Bonjour, Ada!!", 1),
        ("Bonjour, Ada!!!!", 3),
        ("Hello, Ada.", 10),
        ("Bonjour, Zoe.", 10),
        ("Merci, Ada.", 10),
        ("Bonjour, Ada, Ada.", 10),
        ("", 10),
    ],
)
def test_flaws_count_wrong_words_as_ten_and_each_further_mark_as_one(answer: str, expected: int) -> None:
    assert flaws("Greet Ada in French, please.", answer) == expected
    assert follows_rule("Greet Ada in French, please.", answer) == (expected == 0)


def test_every_prompt_can_be_answered_by_the_rule() -> None:
    for request in all_requests() + all_requests(held_out=True):
        assert flaws(request.prompt, "nothing") == 10


def test_chosen_always_has_fewer_flaws_and_is_often_flawed_itself() -> None:
    rows = make_pairs(2000, seed=0)
    assert len(rows) == 2000
    assert all(flaws(row["prompt"], row["chosen"]) < flaws(row["prompt"], row["rejected"]) for row in rows)
    clean = sum(follows_rule(row["prompt"], row["chosen"]) for row in rows) / len(rows)
    assert 0.3 < clean < 0.6
    assert len({tuple(row.values()) for row in rows}) > 1900


def test_rows_are_a_function_of_the_seed() -> None:
    assert make_pairs(50, seed=3) == make_pairs(50, seed=3)
    assert make_pairs(50, seed=3) != make_pairs(50, seed=4)
    assert make_pairs(0, seed=3) == []


def test_held_out_prompts_are_never_trained_on() -> None:
    trained = {request.prompt for request in all_requests()}
    held_out = {request.prompt for request in all_requests(held_out=True)}
    assert not trained & held_out
    assert len(trained) > 1000
    assert len(held_out) > 100
    assert {row["prompt"] for row in make_pairs(500, seed=0, held_out=True)} <= held_out


def test_the_tokenizer_has_a_token_per_byte_and_survives_saving(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = "Grüße, 日本!\n  \t<x>"
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(each) == 259
        ids = each(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text.encode())
        assert each.decode(ids) == text
        assert (each.pad_token_id, each.eos_token_id) == (0, 2)


def test_the_chat_template_is_what_a_model_reads() -> None:
    tokenizer = byte_tokenizer()
    turns = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (ids.count(1), ids.count(2)) == (2, 1)


def test_the_models_special_tokens_are_the_tokenizers() -> None:
    tokenizer = byte_tokenizer()
    config = tiny_llama_config(len(tokenizer))
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (259, 0, 2)
