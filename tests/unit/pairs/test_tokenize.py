"""Tokens of a pair say exactly its text, part at the answer's first character and end with the end of the turn."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_ray.errors import ConfigError, RowError
from dpo_ray.pairs.formats import parse_row, recognise
from dpo_ray.pairs.tokenize import Limits, PairTokenizer, Tokenized, pair_id, tokenizer_digest
from dpo_ray.types import Message, PreferencePair, TokenizedPair, TokenRow

HH_FILE = Path(__file__).resolve().parents[3].parent / "shared/data/hh-rlhf/harmless-base-2000.jsonl.gz"
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# <|im_end|> is marked as special, but is not among the named special tokens.
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
NO_LIMIT = Limits(1_000_000)

Mode = Literal["tokenizer", "none"]


def byte_tokenizer(
    merges: list[tuple[str, str]] | None = None,
    template: Any = CHATML,
    eos: str | None = "</s>",
    added_by_tokenizer: str = "<s> $A </s>",
) -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, but for merges; would itself add BOS and EOS to a text."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges or []]
    model = models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges or [])
    backend = Tokenizer(model)
    # Without the usual regular expression, so that merges may cross from prompt to answer.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(
        single=added_by_tokenizer, special_tokens=[(text, backend.token_to_id(text)) for text in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, chat_template=template)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(smollm2)
    return loaded


def text_pair(prompt: str, chosen: str, rejected: str) -> PreferencePair:
    answers = ((Message("assistant", chosen),), (Message("assistant", rejected),))
    return PreferencePair((Message("user", prompt),), answers, "text")


def dialogue_pair(row: dict[str, str]) -> PreferencePair:
    pair = parse_row(row, recognise([row], format="dialogue"))
    assert isinstance(pair, PreferencePair)
    return pair


def messages_pair(row: dict[str, Any]) -> PreferencePair:
    pair = parse_row(row, recognise([row], format="messages"))
    assert isinstance(pair, PreferencePair)
    return pair


def tokenized(tokenize: PairTokenizer, pair: PreferencePair | TokenRow) -> Tokenized:
    (result,) = tokenize([pair])
    if isinstance(result, RowError):
        raise result
    return result


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, mode: Mode, pair: PreferencePair | TokenRow, limits: Limits = NO_LIMIT
) -> TokenizedPair:
    """A pair's tokens. Raises RowError where it has none."""
    return tokenized(PairTokenizer(tokenizer, mode, limits), pair).pair


def hh_pairs() -> list[tuple[dict[str, str], PreferencePair]]:
    if not HH_FILE.exists():
        pytest.skip(f"needs the hh-rlhf sample at {HH_FILE}")
    with gzip.open(HH_FILE, "rt", encoding="utf-8", newline="\n") as lines:
        rows = [json.loads(line) for line in lines]
    pairs = []
    for row in rows:
        try:
            pairs.append((row, dialogue_pair(row)))
        except RowError:
            continue
    assert len(pairs) > 1900
    return pairs


def decode(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> str:
    text: str = tokenizer.backend_tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    return text


def decoded(tokenizer: PreTrainedTokenizerBase, pair: TokenizedPair) -> tuple[str, ...]:
    return tuple(decode(tokenizer, tokens) for tokens in (pair.prompt, *pair.answers))


def chatml(messages: tuple[Message, ...]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content, _ in messages)


def test_template_text_parts_behind_the_generation_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokens_of(tokenizer, "tokenizer", text_pair("Hi", "yes", "no"))
    assert decoded(tokenizer, tokens) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "yes<|im_end|>\n",
        "no<|im_end|>\n",
    )
    assert [array.dtype for array in (tokens.prompt, *tokens.answers)] == [np.int32] * 3
    # 1 + len("user\nHi") + 1 + len("\n") + 1 + len("assistant\n"); len("yes") + 1 + 1; len("no") + 1 + 1.
    assert [len(array) for array in (tokens.prompt, *tokens.answers)] == [21, 5, 4]


def test_plain_text_gets_the_tokenizers_bos_once_and_its_eos_at_each_end(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokens_of(tokenizer, "none", text_pair("Hi", " yes", "no\n"))
    assert decoded(tokenizer, tokens) == ("<s>Hi", " yes</s>", "no\n</s>")


def test_no_bos_where_the_tokenizer_adds_none_though_it_has_one() -> None:
    """With BOS = EOS, as in GPT-2's family, one that is added only at the end is no BOS."""
    without = byte_tokenizer(added_by_tokenizer="$A")
    assert decoded(without, tokens_of(without, "none", text_pair("Hi", "a", "b")))[0] == "Hi"
    at_end = byte_tokenizer(added_by_tokenizer="$A </s>")
    at_end.bos_token = "</s>"
    assert decoded(at_end, tokens_of(at_end, "none", text_pair("Hi", "a", "b")))[0] == "Hi"


def test_plain_dialogue_is_its_transcript_and_the_answer_keeps_its_space(tokenizer: PreTrainedTokenizerFast) -> None:
    shared = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: \n\nAssistant:"
    pair = dialogue_pair({"chosen": shared + "  yes", "rejected": shared + " no"})
    assert decoded(tokenizer, tokens_of(tokenizer, "none", pair)) == (
        "<s>" + shared,
        "  yes</s>",
        " no</s>",
    )


def test_turns_need_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    pair = messages_pair({"prompt": [{"role": "user", "content": "Hi"}], "chosen": "a", "rejected": "b"})
    with pytest.raises(RowError, match=r"data\.chat_template: tokenizer"):
        tokens_of(tokenizer, "none", pair)


@pytest.mark.parametrize(
    ("answer", "end"),
    [("yes", "yes</s>"), ("yes</s>", "yes</s>"), ("yes<|im_end|> \n", "yes<|im_end|> \n"), ("</s>x", "</s>x</s>")],
)
def test_end_of_turn_is_added_unless_the_text_has_one(
    tokenizer: PreTrainedTokenizerFast, answer: str, end: str
) -> None:
    tokens = tokens_of(tokenizer, "none", text_pair("Hi", answer, "no"))
    assert decode(tokenizer, tokens.answers[0]) == end


def test_a_template_without_an_end_of_turn_gets_eos() -> None:
    bare = byte_tokenizer(template="{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}")
    pair = text_pair("Hi", "yes", "no")
    assert decoded(bare, tokens_of(bare, "tokenizer", pair)) == (
        "[user]Hi",
        "[assistant]yes</s>",
        "[assistant]no</s>",
    )


def test_a_merge_across_the_boundary_does_not_eat_the_prompt() -> None:
    """ "xab" alone is x + ab; parted as "xa" and "b" it must be x, a and b."""
    merging = byte_tokenizer(merges=[("a", "b")])
    ids = merging.get_vocab()
    tokens = tokens_of(merging, "none", text_pair("xa", "bab", "yab"))
    assert tokens.prompt.tolist() == [ids["<s>"], ids["x"], ids["a"]]
    assert tokens.answers[0].tolist() == [ids["b"], ids["ab"], ids["</s>"]]
    assert tokens.answers[1].tolist() == [ids["y"], ids["ab"], ids["</s>"]]


def test_a_sentencepiece_like_tokenizer_invents_no_space() -> None:
    """Metaspace puts a space in front of any text of its own: "yes" alone would be "▁yes"."""
    pieces = {piece: index for index, piece in enumerate(["<s>", "</s>", "▁", *"Qyesno:"])}
    backend = Tokenizer(models.BPE(vocab=pieces, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(["<s>", "</s>"])
    metaspace = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert metaspace.encode("yes", add_special_tokens=False)[0] == pieces["▁"]

    tokens = tokens_of(metaspace, "none", text_pair("Q:", "yes", " no"))

    assert [metaspace.convert_ids_to_tokens(array.tolist()) for array in (tokens.prompt, *tokens.answers)] == [
        ["▁", "Q", ":"],
        ["y", "e", "s", "</s>"],
        ["▁", "n", "o", "</s>"],
    ]


def test_what_stands_before_a_special_token_is_encoded_once(tokenizer: PreTrainedTokenizerFast) -> None:
    """The answers are encoded behind the generation prompt alone, with the same tokens as behind the whole prompt."""
    pair = text_pair("Hi", "yes", "no")
    tokens = tokens_of(tokenizer, "tokenizer", pair)
    for answer, array in zip(pair.answers, tokens.answers, strict=True):
        whole = chatml(pair.prompt + answer)
        assert [*tokens.prompt, *array] == tokenizer.encode(whole, add_special_tokens=False)


def cut_pair(limits: Limits, mode: Mode = "none", tokenizer: PreTrainedTokenizerBase | None = None) -> Tokenized:
    tokenize = PairTokenizer(tokenizer or byte_tokenizer(), mode, limits)
    return tokenized(tokenize, text_pair("Hello", "yes", "no"))


@pytest.mark.parametrize(
    ("limits", "texts", "prompt_cut", "answers_cut"),
    [
        # <s> and "Hello" are 6 tokens; "yes" and </s> 4, "no" and </s> 3.
        (Limits(10), ("<s>Hello", "yes</s>", "no</s>"), 0, (0, 0)),
        (Limits(9), ("<s>Hello", "yes", "no</s>"), 0, (1, 0)),
        (Limits(7), ("<s>Hello", "y", "n"), 0, (3, 2)),
        (Limits(8, completion_truncation_side="left"), ("<s>Hello", "s</s>", "o</s>"), 0, (2, 1)),
        (Limits(99, max_completion_length=2), ("<s>Hello", "ye", "no"), 0, (2, 1)),
        (
            Limits(99, max_completion_length=1, completion_truncation_side="left"),
            ("<s>Hello", "</s>", "</s>"),
            0,
            (3, 2),
        ),
        (Limits(8, max_completion_length=3), ("<s>Hello", "ye", "no"), 0, (2, 1)),
        (Limits(99, max_prompt_length=6), ("<s>Hello", "yes</s>", "no</s>"), 0, (0, 0)),
        (Limits(99, max_prompt_length=4), ("<s>llo", "yes</s>", "no</s>"), 2, (0, 0)),
        (Limits(99, max_prompt_length=1), ("<s>", "yes</s>", "no</s>"), 5, (0, 0)),
        (
            Limits(99, max_prompt_length=4, prompt_truncation_side="right"),
            ("<s>Hel", "yes</s>", "no</s>"),
            2,
            (0, 0),
        ),
        (Limits(7, max_prompt_length=4), ("<s>llo", "yes", "no</s>"), 2, (1, 0)),
        (
            Limits(6, 4, 1, "right", "left"),
            ("<s>Hel", "</s>", "</s>"),
            2,
            (3, 2),
        ),
    ],
)
def test_prompts_and_answers_are_cut_and_counted(
    limits: Limits, texts: tuple[str, ...], prompt_cut: int, answers_cut: tuple[int, int]
) -> None:
    result = cut_pair(limits)
    assert decoded(byte_tokenizer(), result.pair) == texts
    assert (result.prompt_tokens_cut, result.answer_tokens_cut) == (prompt_cut, answers_cut)


def test_a_prompt_without_bos_keeps_none() -> None:
    without = byte_tokenizer(added_by_tokenizer="$A")
    assert decoded(without, cut_pair(Limits(99, max_prompt_length=3), "none", without).pair)[0] == "llo"
    keeps_its_first = byte_tokenizer(template="<s>" + CHATML)
    result = cut_pair(Limits(99, max_prompt_length=3), "tokenizer", keeps_its_first)
    assert decoded(keeps_its_first, result.pair)[0] == "<s>t\n"


@pytest.mark.parametrize("max_prompt_length", [8, 9])
def test_limits_that_leave_no_room_are_a_config_error(max_prompt_length: int) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_prompt_length is \d and data\.max_length 8"):
        Limits(8, max_prompt_length=max_prompt_length)


def test_rows_that_came_as_tokens_are_only_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    row = TokenRow([256, 5, 6, 7], ([8], [9, 10, 11]))
    whole = tokenized(PairTokenizer(tokenizer, "tokenizer", NO_LIMIT, vocab_size=257), row)
    assert [array.tolist() for array in whole.pair.parts] == [[256, 5, 6, 7], [8], [9, 10, 11]]
    cut = tokenized(PairTokenizer(tokenizer, "none", Limits(5, max_prompt_length=3)), row)
    assert [array.tolist() for array in cut.pair.parts] == [[256, 6, 7], [8], [9, 10]]
    assert (cut.prompt_tokens_cut, cut.answer_tokens_cut) == (1, (0, 1))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (TokenRow([1, 300], ([1], [2])), "prompt has token 300, but the model has 300"),
        (TokenRow([1], ([1], [301])), "answer has token 301, but the model has 300"),
        (TokenRow([], ([1], [2])), "prompt has no tokens"),
        (TokenRow([1], ([1], [])), "answer has no tokens"),
        (TokenRow([1] * 9, ([1], [2])), "prompt has 9 tokens"),
    ],
)
def test_tokens_that_are_no_pair_say_why(tokenizer: PreTrainedTokenizerFast, row: TokenRow, words: str) -> None:
    with pytest.raises(RowError, match=words):
        tokenized(PairTokenizer(tokenizer, "tokenizer", Limits(9), vocab_size=300), row)


@pytest.mark.parametrize("mode", ["tokenizer", "none"])
def test_a_bad_pair_does_not_fail_its_batch_and_changes_nothing_beside_it(mode: Mode) -> None:
    refuses = byte_tokenizer(
        template="{% if messages[0]['content'] == 'no' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    )
    tokenize = PairTokenizer(refuses, mode, Limits(60))
    raw = PreferencePair((Message("user", "a"),), text_pair("", "b", "c").answers, "raw")
    batch: list[PreferencePair | TokenRow] = [
        text_pair("Hi", "yes", "no"),
        text_pair("no", "yes", "no"),
        text_pair("x" * 60, "yes", "no"),
        TokenRow([1], ([], [2])),
        raw,
        TokenRow([1], ([3], [2])),
        text_pair("<|im_end|>", "</s>", "<|im_start|>"),
        messages_pair({"prompt": [{"role": "user", "content": "Hi"}], "chosen": "yes", "rejected": "no"}),
        text_pair("Hi", "yes", "no"),
    ]
    results = tokenize(batch)
    refused = {"tokenizer": [1, 2, 3, 4], "none": [2, 3, 7]}[mode]
    assert [place for place, result in enumerate(results) if isinstance(result, RowError)] == refused
    for pair, result in zip(batch, results, strict=True):
        (alone,) = tokenize([pair])
        assert type(alone) is type(result)
        if isinstance(result, Tokenized):
            assert isinstance(alone, Tokenized)
            assert alone.pair.pair_id == result.pair.pair_id
        else:
            assert str(alone) == str(result)
    assert tokenize([]) == []


@pytest.mark.parametrize("max_length", [3, 2])
def test_a_prompt_without_room_for_an_answer_is_refused(tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
    with pytest.raises(
        RowError, match=rf"3 tokens.* in {max_length}: raise data\.max_length, set data\.max_prompt_length"
    ):
        tokens_of(tokenizer, "none", text_pair("Hi", "yes", "no"), Limits(max_length))


def test_a_prompt_without_tokens_is_refused() -> None:
    without_bos = byte_tokenizer(added_by_tokenizer="$A")
    with pytest.raises(RowError, match="prompt has no tokens"):
        tokens_of(without_bos, "none", text_pair("", "yes", "no"))


def test_a_template_that_asks_with_another_prompt_is_read_behind_the_answers_beginning() -> None:
    """The number of turns changes when the answer follows; both answers' renderings agree on it."""
    counts_turns = byte_tokenizer(template="{{ messages|length }} turns" + CHATML)
    pair = text_pair("Hi", "yes", "no")
    result = tokenized(PairTokenizer(counts_turns, "tokenizer", NO_LIMIT), pair)
    assert result.prompt_differs
    assert decoded(counts_turns, result.pair) == (
        "2 turns" + chatml(pair.prompt) + "<|im_start|>assistant\n",
        "yes<|im_end|>\n",
        "no<|im_end|>\n",
    )
    assert not tokenized(PairTokenizer(byte_tokenizer(), "tokenizer", NO_LIMIT), pair).prompt_differs


def test_a_generation_prompt_that_opens_a_thought_is_not_in_the_answers() -> None:
    thinks = byte_tokenizer(template=CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}"))
    result = tokenized(PairTokenizer(thinks, "tokenizer", NO_LIMIT), text_pair("Hi", "<|im_end|>yes", "no"))
    assert result.prompt_differs
    assert decoded(thinks, result.pair) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>yes<|im_end|>\n",
        "no<|im_end|>\n",
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1]['content']|length }} letters" + CHATML,
        "{% for m in messages %}{{ m['content']|upper|replace('\U00107fff', '') }}{% endfor %}{{ messages|length }}",
    ],
)
def test_a_template_whose_prompt_depends_on_the_answer_is_refused(template: str) -> None:
    rewriting = byte_tokenizer(template=template + "{% if add_generation_prompt %}?{% endif %}")
    with pytest.raises(RowError, match=r"rewrites earlier turns .*at character \d+, '.*becomes \['.*none"):
        tokens_of(rewriting, "tokenizer", text_pair("Hi", "yes", "no"))


def test_a_template_that_leaves_the_answer_out_is_refused() -> None:
    deaf = byte_tokenizer(template="{{ messages[0]['content'] }}")
    with pytest.raises(RowError, match="renders nothing of an answer"):
        tokens_of(deaf, "tokenizer", text_pair("Hi", "yes", "no"))


def test_texts_that_begin_alike_need_no_template(tokenizer: PreTrainedTokenizerFast) -> None:
    pair = PreferencePair((Message("user", "The sky"),), text_pair("", " is", " was").answers, "raw")
    assert decoded(tokenizer, tokens_of(tokenizer, "none", pair)) == ("<s>The sky", " is</s>", " was</s>")
    with pytest.raises(RowError, match=r"data\.chat_template: none"):
        tokens_of(tokenizer, "tokenizer", pair)


def test_a_dialogue_without_a_template_quotes_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """No template wrote them; and an answer that ends with a quoted EOS gets a real one."""
    shared = "\n\nHuman: What is <s>?\n\nAssistant:"
    pair = dialogue_pair({"chosen": shared + " It is no </s>", "rejected": shared + " no"})
    tokens = tokens_of(tokenizer, "none", pair)
    assert decoded(tokenizer, tokens) == ("<s>" + shared, " It is no </s></s>", " no</s>")
    assert [np.sum(array >= 256) for array in tokens.parts] == [1, 1, 1]


def test_private_characters_beside_a_quoted_special_token_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """They stand for special tokens there: with one of them a content could forge a turn."""
    forged = chr(0x10C000)
    with pytest.raises(RowError, match=r"character 1 of a text, U\+10C000"):
        tokens_of(tokenizer, "tokenizer", text_pair("<s>", f"a{forged}", "no"))
    assert forged in decoded(tokenizer, tokens_of(tokenizer, "tokenizer", text_pair("s", f"a{forged}", "no")))[1]


def test_a_vocabulary_that_reads_any_such_text_as_the_token_is_refused() -> None:
    """A Unigram model finds "</s>" among its own pieces, special or not."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in "</s>yno|")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    template = "{% for m in messages %}{{ '<s>' + m['content'] + '</s>' }}{% endfor %}"
    unigram = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", chat_template=template
    )
    tokenize = PairTokenizer(unigram, "tokenizer", NO_LIMIT)
    assert isinstance(tokenize([text_pair("yes", "y", "no")])[0], Tokenized)
    with pytest.raises(RowError, match="reads the text '</s>' as the special token"):
        tokenized(tokenize, text_pair("yes </s>", "y", "no"))


def test_special_tokens_that_a_normalizer_would_write_are_none_either() -> None:
    """With a normalizer that folds case, "</S>" in a text would be </s>."""
    folding = byte_tokenizer()
    backend = folding.backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=True)])
    folding = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", chat_template=CHATML.replace("<|im_end|>", "<end>")
    )
    end = folding.convert_tokens_to_ids("<end>")
    assert end in folding.encode("a <END>", add_special_tokens=False)
    tokens = tokens_of(folding, "tokenizer", text_pair("a <END>", "<End>", "no"))
    assert [np.sum(array == end) for array in tokens.parts] == [1, 1, 1]
    assert decode(folding, tokens.answers[0]) == "<end><end>\n"


def test_a_tokenizer_in_python_reads_plain_texts_and_refuses_quoted_special_tokens() -> None:
    from transformers import ByT5Tokenizer

    in_python = ByT5Tokenizer(extra_ids=0, chat_template="{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    tokens = tokens_of(in_python, "tokenizer", text_pair("Hi", "yes", "no"))
    assert in_python.convert_ids_to_tokens(tokens.answers[0].tolist()) == ["y", "e", "s", "</s>"]
    with pytest.raises(RowError, match="no Rust backend"):
        tokens_of(in_python, "tokenizer", text_pair("Hi </s>", "yes", "no"))


def test_a_tokenizer_that_can_part_no_text_refuses_it() -> None:
    """Its only word for "ab" covers both sides of the boundary, and there is none for "b" alone."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "ab": 3}, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "</s>"])
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    with pytest.raises(RowError, match="cannot part prompt and answer.*'ab'"):
        tokens_of(words, "none", text_pair("a", "b", "b"))


def test_a_merge_across_the_boundary_invents_no_space() -> None:
    """ "▁Q:y" merges ":y", so that the full text does not begin with the prompt's tokens; "yes" alone is "▁yes"."""
    merges = [(":", "y"), ("▁", "yes"), ("y", "es"), ("e", "s")]
    names = ["<s>", "</s>", "▁", "\n", *"Qyesno:", "es", "yes", ":y", "▁yes"]
    backend = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(["<s>", "</s>"])
    metaspace = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokens = tokens_of(metaspace, "none", text_pair("Q:", "yes", "no"))
    assert [metaspace.convert_ids_to_tokens(array.tolist()) for array in tokens.parts] == [
        ["▁", "Q", ":"],
        ["yes", "</s>"],
        ["n", "o", "</s>"],
    ]


def test_a_template_that_refuses_the_turns_refuses_the_row() -> None:
    strict = byte_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RowError, match="refuses turns with the roles user, assistant: roles must alternate"):
        tokens_of(strict, "tokenizer", text_pair("Hi", "yes", "no"))


@pytest.mark.parametrize("template", [None, {"tool_use": CHATML}])
def test_a_tokenizer_without_a_template_is_a_config_error(template: Any) -> None:
    plain = byte_tokenizer(template=template)
    with pytest.raises(ConfigError, match=r"data\.chat_template: none"):
        PairTokenizer(plain, "tokenizer", NO_LIMIT)
    PairTokenizer(plain, "none", NO_LIMIT)


@pytest.mark.parametrize("mode", ["tokenizer", "none"])
def test_a_tokenizer_without_eos_is_a_config_error(mode: Mode) -> None:
    with pytest.raises(ConfigError, match="no EOS token"):
        PairTokenizer(byte_tokenizer(eos=None), mode, NO_LIMIT)


@pytest.mark.parametrize("mode", ["tokenizer", "none"])
def test_truncation_and_padding_set_on_the_tokenizer_do_nothing(mode: Mode) -> None:
    pair = text_pair("How are you?", "fine", "no")
    expected = tokens_of(byte_tokenizer(), mode, pair)
    disturbed = byte_tokenizer()
    disturbed.backend_tokenizer.enable_truncation(4)
    disturbed.backend_tokenizer.enable_padding(length=64)
    disturbed.split_special_tokens = True
    assert tokens_of(disturbed, mode, pair).pair_id == expected.pair_id


@pytest.mark.parametrize("mode", ["tokenizer", "none"])
def test_survives_pickling(tokenizer: PreTrainedTokenizerFast, mode: Mode) -> None:
    tokenize = PairTokenizer(tokenizer, mode, Limits(30))
    pair = text_pair("Hi", "yes, gladly, and more than once", "no")
    before, after = (tokenized(each, pair).pair for each in (tokenize, pickle.loads(pickle.dumps(tokenize))))
    assert after.pair_id == before.pair_id
    assert [array.tolist() for array in (after.prompt, *after.answers)] == [
        array.tolist() for array in (before.prompt, *before.answers)
    ]


ODD_TEXT = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.sampled_from(["ab", "aab", "\n\n", " ", "\u0301", "\u200d", "🇨🇭", "\x00", "\r\n", "ё", *SPECIAL]),
    ),
    max_size=5,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(prompt=ODD_TEXT, chosen=ODD_TEXT, rejected=ODD_TEXT)
def test_any_plain_text_decodes_to_itself(prompt: str, chosen: str, rejected: str) -> None:
    got = decoded(MERGING, tokens_of(MERGING, "none", text_pair(prompt, chosen, rejected)))
    ends = ["" if answer.rstrip().endswith(SPECIAL) else "</s>" for answer in (chosen, rejected)]
    assert got == ("<s>" + prompt, chosen + ends[0], rejected + ends[1])


MERGING = byte_tokenizer(merges=[("a", "b"), ("Ċ", "Ċ"), ("Ġ", "Ġ")])

ARRAYS = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(lambda ids: np.asarray(ids, dtype=np.int32))


def test_pair_id_is_the_digest_of_counts_lengths_and_tokens() -> None:
    """Written out: 2 answers; 2 tokens 1, 70000; 1 token 7; 0 tokens; each number four bytes, lowest first."""
    content = struct.pack("<7i", 2, 2, 1, 70000, 1, 7, 0)
    arrays = [np.asarray(ids, dtype=np.int32) for ids in ([1, 70000], [7], [])]
    assert pair_id(arrays[0], arrays[1:]) == hashlib.sha256(content).digest()[:16]
    wide = [np.asarray(ids, dtype=">i8") for ids in ([1, 70000], [7], [])]
    assert pair_id(wide[0], wide[1:]) == pair_id(arrays[0], arrays[1:])


@given(st.tuples(ARRAYS, ARRAYS, ARRAYS), st.tuples(ARRAYS, ARRAYS, ARRAYS))
def test_pair_ids_are_equal_exactly_where_the_tokens_are(left: Any, right: Any) -> None:
    same = [ids.tolist() for ids in left] == [ids.tolist() for ids in right]
    assert (pair_id(left[0], left[1:]) == pair_id(right[0], right[1:])) == same


def test_pair_id_sees_a_moved_boundary_an_exchange_and_a_lost_answer() -> None:
    one, two, both = (np.asarray(ids, dtype=np.int32) for ids in ([1], [2], [1, 2]))
    ids = {pair_id(both, [one, two]), pair_id(one, [both, two]), pair_id(both, [two, one]), pair_id(both, [one])}
    assert len(ids) == 4


def test_tokens_carry_the_id_of_what_was_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokens_of(tokenizer, "none", text_pair("Hi", "yes", "no"), Limits(5))
    assert tokens.pair_id == pair_id(tokens.prompt, tokens.answers)
    assert tokens.pair_id == tokens_of(tokenizer, "none", text_pair("Hi", "yeah", "no"), Limits(5)).pair_id


def test_digest_stays_through_use_pickling_and_saving(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "</s>"
    before = tokenizer_digest(tokenizer)
    assert len(before) == 64
    tokenizer("some text", truncation=True, max_length=3, padding="max_length", padding_side="left")
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(tokenizer) == before
    assert tokenizer_digest(pickle.loads(pickle.dumps(tokenizer))) == before
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path)) == before


def test_digest_changes_with_whatever_changes_tokens() -> None:
    base = byte_tokenizer()
    other_split = byte_tokenizer()
    other_split.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("x"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    other_bos = byte_tokenizer()
    other_bos.bos_token = "<|im_start|>"
    variants = [
        base,
        byte_tokenizer(merges=[("a", "b")]),
        byte_tokenizer(template=CHATML + " "),
        byte_tokenizer(template=None),
        byte_tokenizer(eos="<|im_end|>"),
        byte_tokenizer(added_by_tokenizer="$A"),
        other_split,
        other_bos,
    ]
    assert len({tokenizer_digest(variant) for variant in variants}) == len(variants)
    assert tokenizer_digest(byte_tokenizer()) == tokenizer_digest(base)


@pytest.mark.parametrize("name", ["tokenizer", pytest.param("smollm2_tokenizer", marks=pytest.mark.shared)])
def test_every_row_of_hh_decodes_to_its_dialogue(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: PreTrainedTokenizerBase = request.getfixturevalue(name)
    bos, eos = ("<s>", "</s>") if name == "tokenizer" else ("", "<|im_end|>")
    tokenize = PairTokenizer(tokenizer, "none", NO_LIMIT)
    rows, pairs = zip(*hh_pairs(), strict=True)
    for row, result in zip(rows, tokenize(pairs), strict=True):
        assert isinstance(result, Tokenized)
        prompt, chosen, rejected = decoded(tokenizer, result.pair)
        assert prompt.endswith("\n\nAssistant:")
        assert prompt + chosen == bos + row["chosen"] + eos
        assert prompt + rejected == bos + row["rejected"] + eos


@pytest.mark.parametrize("name", ["tokenizer", pytest.param("smollm2_tokenizer", marks=pytest.mark.shared)])
def test_every_row_of_hh_decodes_to_its_template(name: str, request: pytest.FixtureRequest) -> None:
    """SmolLM2's template begins a conversation without a system turn with one of its own."""
    tokenizer: PreTrainedTokenizerBase = request.getfixturevalue(name)
    system = () if name == "tokenizer" else (Message("system", SMOLLM2_SYSTEM),)
    tokenize = PairTokenizer(tokenizer, "tokenizer", NO_LIMIT)
    pairs = [pair for _, pair in hh_pairs()]
    for pair, result in zip(pairs, tokenize(pairs), strict=True):
        assert isinstance(result, Tokenized)
        prompt, *answers = decoded(tokenizer, result.pair)
        assert prompt == chatml(system + pair.prompt) + "<|im_start|>assistant\n"
        assert answers == [answer[0].content + "<|im_end|>\n" for answer in pair.answers]


@pytest.mark.shared
def test_smollm2_parts_as_its_own_tokenization_does(smollm2_tokenizer: PreTrainedTokenizerBase) -> None:
    """Its special tokens part prompt and answer, so nothing merges: the pieces are the whole's tokens."""
    pair = text_pair("Why is the sky blue?", "\n\nRayleigh scattering.", "No idea")
    tokens = tokens_of(smollm2_tokenizer, "tokenizer", pair)
    whole = chatml((Message("system", SMOLLM2_SYSTEM), *pair.prompt, *pair.answers[1]))
    assert [*tokens.prompt, *tokens.answers[1]] == smollm2_tokenizer.encode(whole, add_special_tokens=False)
    assert tokens.answers[1].tolist()[-2:] == smollm2_tokenizer.encode("<|im_end|>\n", add_special_tokens=False)


CLOCK = {"type": "function", "function": {"name": "clock", "description": "Tells the time."}}
CALL = Message("assistant", "Hm", {"tool_calls": [{"function": {"name": "clock", "arguments": {}}}]})
TOOLS_CHATML = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace(
    "m['content']", "(m.thinking or '') + (m.content or '') + (m.tool_calls | tojson if m.tool_calls else '')"
)


def pair_with_tools(
    chosen: Message, tools: list[dict[str, Any]] | None = None, said: tuple[Message, ...] = ()
) -> PreferencePair:
    prompt = (Message("user", "Hi"), *said)
    return PreferencePair(prompt, ((chosen,), (Message("assistant", "no"),)), "text", tools)


def test_tools_and_calls_and_thoughts_are_rendered() -> None:
    tokenizer = byte_tokenizer(template=TOOLS_CHATML)
    calls = json.dumps(CALL.as_dict()["tool_calls"])
    pair = pair_with_tools(Message("assistant", None, {"thinking": "So.", **(CALL.extra or {})}), [CLOCK], (CALL,))
    assert decoded(tokenizer, tokens_of(tokenizer, "tokenizer", pair)) == (
        f"{json.dumps([CLOCK])}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHm{calls}<|im_end|>\n"
        "<|im_start|>assistant\n",
        f"So.{calls}<|im_end|>\n",
        "no<|im_end|>\n",
    )


@pytest.mark.parametrize(
    ("pair", "left_out"),
    [
        (pair_with_tools(Message("assistant", "yes"), [CLOCK]), "tools"),
        (pair_with_tools(CALL), "'tool_calls'"),
        (pair_with_tools(Message("assistant", "yes"), said=(CALL, Message("tool", "noon"))), "'tool_calls'"),
        (pair_with_tools(Message("assistant", "yes", {"reasoning": "So."})), "'reasoning'"),
    ],
)
def test_what_a_template_leaves_out_is_refused(
    tokenizer: PreTrainedTokenizerFast, pair: PreferencePair, left_out: str
) -> None:
    fine = text_pair("Hi", "yes", "no")
    refused, alone = PairTokenizer(tokenizer, "tokenizer", NO_LIMIT)([pair, fine])
    assert f"the chat template leaves {left_out} out" in str(refused)
    assert isinstance(alone, Tokenized)
    with pytest.raises(RowError, match=f"{left_out} .*no reading without a chat template"):
        tokens_of(tokenizer, "none", pair)


def test_a_generation_prompt_that_opens_a_thought_stands_behind_tools_too() -> None:
    tokenizer = byte_tokenizer(template=TOOLS_CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}"))
    prompt, chosen, _ = decoded(tokenizer, tokens_of(tokenizer, "tokenizer", pair_with_tools(CALL, [CLOCK])))
    assert prompt == f"{json.dumps([CLOCK])}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert chosen.startswith("Hm[{")


def test_earlier_thoughts_may_be_left_out() -> None:
    tokenizer = byte_tokenizer()
    pair = pair_with_tools(Message("assistant", "yes"), said=(Message("assistant", "Hm", {"thinking": "So."}),))
    assert "So." not in decoded(tokenizer, tokens_of(tokenizer, "tokenizer", pair))[0]


def test_a_template_for_tools_of_its_own_renders_them() -> None:
    """The default one refuses tools' turns, so that there is no rendering without tools to compare with."""
    refuses = "{% for m in messages if m.role == 'tool' %}{{ raise_exception('tool') }}{% endfor %}" + CHATML
    tokenizer = byte_tokenizer(template={"default": refuses, "tool_use": TOOLS_CHATML})
    said = (CALL, Message("tool", "noon"))
    prompt = decoded(tokenizer, tokens_of(tokenizer, "tokenizer", pair_with_tools(CALL, [CLOCK], said)))[0]
    assert prompt.startswith(json.dumps([CLOCK]))


@pytest.mark.parametrize("how", ["string", "tojson(ensure_ascii=True)"])
def test_a_special_token_that_the_template_escapes_is_refused(how: str) -> None:
    tokenizer = byte_tokenizer(template="{% if tools %}{{ tools | " + how + " }}{% endif %}" + CHATML)
    for name, refused in (("</s>", True), ("/s", False)):
        (result,) = PairTokenizer(tokenizer, "tokenizer", NO_LIMIT)(
            [pair_with_tools(Message("assistant", "yes"), [{"name": name}])]
        )
        assert isinstance(result, RowError) == refused
        assert not refused or "writes these with escapes" in str(result)


def test_what_else_the_template_is_given() -> None:
    """As Qwen3's thinking, which its template writes in front of the answer unless it is told not to."""
    template = CHATML.replace(
        "<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>assistant\n' }}{% if enable_thinking is false %}{{ '<think></think>' }}{% endif %}{% endif %}",
    ).replace(
        "m['role'] + '\n' + m['content']",
        "m['role'] + '\n' + ('<think></think>' if m['role'] == 'assistant' and enable_thinking is false else '') "
        "+ m['content']",
    )
    tokenizer = byte_tokenizer(template=template)
    pair = text_pair("Q", "good", "bad")
    for kwargs, thought in (({}, ""), ({"enable_thinking": False}, "<think></think>")):
        made = tokenized(PairTokenizer(tokenizer, "tokenizer", NO_LIMIT, template_kwargs=kwargs), pair).pair
        asked = f"<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n{thought}"
        assert tokenizer.decode(made.prompt) == asked
        assert [tokenizer.decode(answer) for answer in made.answers] == ["good<|im_end|>\n", "bad<|im_end|>\n"]
