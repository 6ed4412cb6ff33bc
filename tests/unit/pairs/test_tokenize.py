"""Tokens of a pair say exactly its text, part at the answer's first character and end with the end of the turn."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_ray.errors import ConfigError, RowError
from dpo_ray.pairs.formats import parse_row
from dpo_ray.pairs.tokenize import PairTokenizer, pair_id, tokenizer_digest
from dpo_ray.types import Message, PreferencePair, TokenizedPair

HH_FILE = Path(__file__).resolve().parents[3].parent / "shared/data/hh-rlhf/harmless-base-2000.jsonl.gz"
SMOLLM2 = os.environ.get("DPO_RAY_SMOLLM2")
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# <|im_end|> is marked as special, but is not among the named special tokens.
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
NO_LIMIT = 1_000_000

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
def smollm2() -> PreTrainedTokenizerBase:
    if SMOLLM2 is None:
        pytest.skip("needs DPO_RAY_SMOLLM2, a directory with SmolLM2's tokenizer")
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(SMOLLM2)
    return loaded


def text_pair(prompt: str, chosen: str, rejected: str) -> PreferencePair:
    answers = ((Message("assistant", chosen),), (Message("assistant", rejected),))
    return PreferencePair((Message("user", prompt),), answers, "text")


def hh_pairs() -> list[tuple[dict[str, str], PreferencePair]]:
    if not HH_FILE.exists():
        pytest.skip(f"needs the hh-rlhf sample at {HH_FILE}")
    with gzip.open(HH_FILE, "rt", encoding="utf-8", newline="\n") as lines:
        rows = [json.loads(line) for line in lines]
    pairs = []
    for row in rows:
        try:
            pairs.append((row, parse_row(row)))
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
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)


def test_template_text_parts_behind_the_generation_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = PairTokenizer(tokenizer, "tokenizer", NO_LIMIT)(text_pair("Hi", "yes", "no"))
    assert decoded(tokenizer, tokens) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "yes<|im_end|>\n",
        "no<|im_end|>\n",
    )
    assert [array.dtype for array in (tokens.prompt, *tokens.answers)] == [np.int32] * 3
    # 1 + len("user\nHi") + 1 + len("\n") + 1 + len("assistant\n"); len("yes") + 1 + 1; len("no") + 1 + 1.
    assert [len(array) for array in (tokens.prompt, *tokens.answers)] == [21, 5, 4]


def test_plain_text_gets_the_tokenizers_bos_once_and_its_eos_at_each_end(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = PairTokenizer(tokenizer, "none", NO_LIMIT)(text_pair("Hi", " yes", "no\n"))
    assert decoded(tokenizer, tokens) == ("<s>Hi", " yes</s>", "no\n</s>")


def test_no_bos_where_the_tokenizer_adds_none_though_it_has_one() -> None:
    """With BOS = EOS, as in GPT-2's family, one that is added only at the end is no BOS."""
    without = byte_tokenizer(added_by_tokenizer="$A")
    assert decoded(without, PairTokenizer(without, "none", NO_LIMIT)(text_pair("Hi", "a", "b")))[0] == "Hi"
    at_end = byte_tokenizer(added_by_tokenizer="$A </s>")
    at_end.bos_token = "</s>"
    assert decoded(at_end, PairTokenizer(at_end, "none", NO_LIMIT)(text_pair("Hi", "a", "b")))[0] == "Hi"


def test_plain_dialogue_is_its_transcript_and_the_answer_keeps_its_space(tokenizer: PreTrainedTokenizerFast) -> None:
    shared = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: \n\nAssistant:"
    pair = parse_row({"chosen": shared + "  yes", "rejected": shared + " no"})
    assert decoded(tokenizer, PairTokenizer(tokenizer, "none", NO_LIMIT)(pair)) == (
        "<s>" + shared,
        "  yes</s>",
        " no</s>",
    )


def test_turns_need_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    pair = parse_row({"prompt": [{"role": "user", "content": "Hi"}], "chosen": "a", "rejected": "b"})
    with pytest.raises(RowError, match=r"data\.chat_template: tokenizer"):
        PairTokenizer(tokenizer, "none", NO_LIMIT)(pair)


@pytest.mark.parametrize(
    ("answer", "end"),
    [("yes", "yes</s>"), ("yes</s>", "yes</s>"), ("yes<|im_end|> \n", "yes<|im_end|> \n"), ("</s>x", "</s>x</s>")],
)
def test_end_of_turn_is_added_unless_the_text_has_one(
    tokenizer: PreTrainedTokenizerFast, answer: str, end: str
) -> None:
    tokens = PairTokenizer(tokenizer, "none", NO_LIMIT)(text_pair("Hi", answer, "no"))
    assert decode(tokenizer, tokens.answers[0]) == end


def test_a_template_without_an_end_of_turn_gets_eos() -> None:
    bare = byte_tokenizer(template="{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}")
    pair = text_pair("Hi", "yes", "no")
    assert decoded(bare, PairTokenizer(bare, "tokenizer", NO_LIMIT)(pair)) == (
        "[user]Hi",
        "[assistant]yes</s>",
        "[assistant]no</s>",
    )


def test_a_merge_across_the_boundary_does_not_eat_the_prompt() -> None:
    """ "xab" alone is x + ab; parted as "xa" and "b" it must be x, a and b."""
    merging = byte_tokenizer(merges=[("a", "b")])
    ids = merging.get_vocab()
    tokens = PairTokenizer(merging, "none", NO_LIMIT)(text_pair("xa", "bab", "yab"))
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

    tokens = PairTokenizer(metaspace, "none", NO_LIMIT)(text_pair("Q:", "yes", " no"))

    assert [metaspace.convert_ids_to_tokens(array.tolist()) for array in (tokens.prompt, *tokens.answers)] == [
        ["▁", "Q", ":"],
        ["y", "e", "s", "</s>"],
        ["▁", "n", "o", "</s>"],
    ]


class CountingTokenizer(PreTrainedTokenizerFast):
    """Remembers each text that it was asked to encode."""

    def __call__(self, text: Any, **options: Any) -> Any:
        self.encoded: list[str] = [*getattr(self, "encoded", []), *([text] if isinstance(text, str) else text)]
        return super().__call__(text, **options)


def test_prompt_and_full_texts_are_encoded_once_each() -> None:
    plain = byte_tokenizer()
    counting = CountingTokenizer(
        tokenizer_object=plain.backend_tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHATML
    )
    tokenize = PairTokenizer(counting, "tokenizer", NO_LIMIT)
    pair = text_pair("Hi", "yes", "no")
    counting.encoded = []
    tokenize(pair)
    prompt = chatml(pair.prompt) + "<|im_start|>assistant\n"
    assert counting.encoded == [prompt, *(chatml(pair.prompt + answer) for answer in pair.answers)]


def test_answers_are_cut_at_the_end_and_each_by_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    """BOS and "Hi" are 3 tokens: of 6, 3 are left; "yes" loses its EOS, "no" with its EOS just fits."""
    pair = text_pair("Hi", "yes", "no")
    assert decoded(tokenizer, PairTokenizer(tokenizer, "none", 6)(pair)) == ("<s>Hi", "yes", "no</s>")
    assert decoded(tokenizer, PairTokenizer(tokenizer, "none", 4)(pair)) == ("<s>Hi", "y", "n")


@pytest.mark.parametrize("max_length", [3, 2])
def test_a_prompt_without_room_for_an_answer_is_refused(tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
    with pytest.raises(RowError, match=rf"3 tokens.* in {max_length}: raise data\.max_length"):
        PairTokenizer(tokenizer, "none", max_length)(text_pair("Hi", "yes", "no"))


def test_a_prompt_without_tokens_is_refused() -> None:
    without_bos = byte_tokenizer(added_by_tokenizer="$A")
    with pytest.raises(RowError, match="prompt has no tokens"):
        PairTokenizer(without_bos, "none", NO_LIMIT)(text_pair("", "yes", "no"))


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    counts_turns = byte_tokenizer(template="{{ messages|length }} turns" + CHATML)
    with pytest.raises(RowError, match=r"rewrites earlier turns.*at character 0, '1 turns.*becomes '2 turns"):
        PairTokenizer(counts_turns, "tokenizer", NO_LIMIT)(text_pair("Hi", "yes", "no"))


def test_a_template_that_refuses_the_turns_refuses_the_row() -> None:
    strict = byte_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RowError, match="refuses turns with the roles user: roles must alternate"):
        PairTokenizer(strict, "tokenizer", NO_LIMIT)(text_pair("Hi", "yes", "no"))


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
    expected = PairTokenizer(byte_tokenizer(), mode, NO_LIMIT)(pair)
    disturbed = byte_tokenizer()
    disturbed.backend_tokenizer.enable_truncation(4)
    disturbed.backend_tokenizer.enable_padding(length=64)
    disturbed.split_special_tokens = True
    assert PairTokenizer(disturbed, mode, NO_LIMIT)(pair).pair_id == expected.pair_id


@pytest.mark.parametrize("mode", ["tokenizer", "none"])
def test_survives_pickling(tokenizer: PreTrainedTokenizerFast, mode: Mode) -> None:
    tokenize = PairTokenizer(tokenizer, mode, 30)
    pair = text_pair("Hi", "yes, gladly, and more than once", "no")
    before, after = tokenize(pair), pickle.loads(pickle.dumps(tokenize))(pair)
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
def test_any_text_decodes_to_its_template(prompt: str, chosen: str, rejected: str) -> None:
    """No token lost, none counted twice, whatever merges across the boundary there are."""
    pair = text_pair(prompt, chosen, rejected)
    got = decoded(MERGING, PairTokenizer(MERGING, "tokenizer", NO_LIMIT)(pair))
    assert got[0] == chatml(pair.prompt) + "<|im_start|>assistant\n"
    assert got[1:] == (chosen + "<|im_end|>\n", rejected + "<|im_end|>\n")


@settings(max_examples=150, deadline=None)
@given(prompt=ODD_TEXT, chosen=ODD_TEXT, rejected=ODD_TEXT)
def test_any_plain_text_decodes_to_itself(prompt: str, chosen: str, rejected: str) -> None:
    got = decoded(MERGING, PairTokenizer(MERGING, "none", NO_LIMIT)(text_pair(prompt, chosen, rejected)))
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
    tokens = PairTokenizer(tokenizer, "none", 5)(text_pair("Hi", "yes", "no"))
    assert tokens.pair_id == pair_id(tokens.prompt, tokens.answers)
    assert tokens.pair_id == PairTokenizer(tokenizer, "none", 5)(text_pair("Hi", "yeah", "no")).pair_id


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


@pytest.mark.parametrize("name", ["tokenizer", "smollm2"])
def test_every_row_of_hh_decodes_to_its_dialogue(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: PreTrainedTokenizerBase = request.getfixturevalue(name)
    bos, eos = ("<s>", "</s>") if name == "tokenizer" else ("", "<|im_end|>")
    tokenize = PairTokenizer(tokenizer, "none", NO_LIMIT)
    for row, pair in hh_pairs():
        prompt, chosen, rejected = decoded(tokenizer, tokenize(pair))
        assert prompt.endswith("\n\nAssistant:")
        assert prompt + chosen == bos + row["chosen"] + eos
        assert prompt + rejected == bos + row["rejected"] + eos


@pytest.mark.parametrize("name", ["tokenizer", "smollm2"])
def test_every_row_of_hh_decodes_to_its_template(name: str, request: pytest.FixtureRequest) -> None:
    """SmolLM2's template begins a conversation without a system turn with one of its own."""
    tokenizer: PreTrainedTokenizerBase = request.getfixturevalue(name)
    system = () if name == "tokenizer" else (Message("system", SMOLLM2_SYSTEM),)
    tokenize = PairTokenizer(tokenizer, "tokenizer", NO_LIMIT)
    for _, pair in hh_pairs():
        prompt, *answers = decoded(tokenizer, tokenize(pair))
        assert prompt == chatml(system + pair.prompt) + "<|im_start|>assistant\n"
        assert answers == [answer[0].content + "<|im_end|>\n" for answer in pair.answers]


def test_smollm2_parts_as_its_own_tokenization_does(smollm2: PreTrainedTokenizerBase) -> None:
    """Its special tokens part prompt and answer, so nothing merges: the pieces are the whole's tokens."""
    pair = text_pair("Why is the sky blue?", "\n\nRayleigh scattering.", "No idea")
    tokens = PairTokenizer(smollm2, "tokenizer", NO_LIMIT)(pair)
    whole = chatml((Message("system", SMOLLM2_SYSTEM), *pair.prompt, *pair.answers[1]))
    assert [*tokens.prompt, *tokens.answers[1]] == smollm2.encode(whole, add_special_tokens=False)
    assert tokens.answers[1].tolist()[-2:] == smollm2.encode("<|im_end|>\n", add_special_tokens=False)
