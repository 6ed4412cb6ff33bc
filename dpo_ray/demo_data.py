"""What the demo needs and nobody has to download: a tokenizer, a model's shape, pairs whose rule code can check.

The rule: say what was asked, in the language that was asked for, to the person named, with at most one
exclamation mark. Both answers of a pair may break it; the one that breaks it less is chosen. So supervised
training on the chosen answers yields a model that is fluent and still breaks the rule, and only the comparison
of the two answers teaches it.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

PHRASES = {
    "Greet": {"French": "Bonjour", "Spanish": "Hola", "German": "Moin", "Italian": "Salve", "English": "Hello"},
    "Thank": {"French": "Merci", "Spanish": "Gracias", "German": "Danke", "Italian": "Grazie", "English": "Thanks"},
    "Call": {"French": "Viens", "Spanish": "Ven", "German": "Komm", "Italian": "Vieni", "English": "Come"},
}
ASKED_LANGUAGES = ("French", "Spanish", "German", "Italian")  # English is what a careless answer falls back to
REQUESTS = (
    "{act} {name} in {language}.",
    "{act} {name} in {language}, please.",
    "Please: {act} {name} in {language}.",
    "In {language}: {act} {name}.",
    "Now in {language}, {act} {name}!",
)
_NAMES = """
Ada Bruno Carla Diego Emma Felix Greta Hugo Ines Jonas Kira Lena Mara Nils Olga Paula Quentin Rosa Samir Theo Uma Vera
Wanda Xenia Yara Zoe
"""
NAMES = tuple(_NAMES.split())

# How often a drawn answer ignores the language, and how many exclamation marks it has.
ENGLISH_SHARE = 0.3
MARKS, MARKS_WEIGHTS = (0, 1, 2, 3, 4), (3, 3, 3, 8, 3)


@dataclass(frozen=True, slots=True)
class Request:
    """What a prompt asks for."""

    act: str
    name: str
    language: str
    form: str

    @property
    def prompt(self) -> str:
        """The prompt's text."""
        return self.form.format(act=self.act, name=self.name, language=self.language)


def all_requests(*, held_out: bool = False) -> list[Request]:
    """Every request of one side of the split, which depends on the prompt's text alone.

    Args:
        held_out: The tenth of all prompts that training never sees, in place of the other nine tenths.
    """
    requests = [
        Request(act, name, language, form)
        for act in PHRASES
        for name in NAMES
        for language in ASKED_LANGUAGES
        for form in REQUESTS
    ]
    return [request for request in requests if (zlib.crc32(request.prompt.encode()) % 10 == 0) == held_out]


def make_pairs(num: int, seed: int, *, held_out: bool = False) -> list[dict[str, str]]:
    """Rows `prompt`, `chosen`, `rejected`: two careless answers to a request, the less flawed one chosen.

    Args:
        num: Rows wanted; prompts repeat, with other answers, once there are more rows than prompts.
        seed: Same seed, same rows.
        held_out: Take the prompts from the held-out side of the split.
    """
    rng = random.Random(f"{seed}/{held_out}")
    requests = all_requests(held_out=held_out)
    rows: list[dict[str, str]] = []
    while len(rows) < num:
        for request in rng.sample(requests, k=min(len(requests), num - len(rows))):
            first, second = _draw_answer(rng, request), _draw_answer(rng, request)
            while flaws(request.prompt, first) == flaws(request.prompt, second):
                second = _draw_answer(rng, request)
            chosen, rejected = sorted((first, second), key=lambda answer: flaws(request.prompt, answer))
            rows.append({"prompt": request.prompt, "chosen": chosen, "rejected": rejected})
    return rows


def _draw_answer(rng: random.Random, request: Request) -> str:
    language = "English" if rng.random() < ENGLISH_SHARE else request.language
    marks = rng.choices(MARKS, MARKS_WEIGHTS)[0]
    return f"{PHRASES[request.act][language]}, {request.name}{'!' * marks or '.'}"


def flaws(prompt: str, answer: str) -> int:
    """How far an answer is from the rule: 10 for wrong words or a wrong name, 1 for each mark beyond the first.

    Args:
        prompt: A prompt made by this module.
        answer: Any text.

    Returns:
        0 when the answer follows the rule.
    """
    request = _parse(prompt)
    text = answer.strip()
    said = text.rstrip("!.") == f"{PHRASES[request.act][request.language]}, {request.name}"
    return (0 if said else 10) + max(0, text.count("!") - 1)


def follows_rule(prompt: str, answer: str) -> bool:
    """Whether an answer says what was asked, in the asked language, by name, with at most one exclamation mark."""
    return flaws(prompt, answer) == 0


def _parse(prompt: str) -> Request:
    words = prompt.replace(",", " ").replace(".", " ").replace(":", " ").replace("!", " ").split()
    act = next(word for word in words if word in PHRASES)
    name = next(word for word in words if word in NAMES)
    language = next(word for word in words if word in ASKED_LANGUAGES)
    return Request(act, name, language, form="")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per UTF-8 byte, three specials, and a chat template; 259 tokens in all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate([PAD, TURN_START, TURN_END, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, TURN_START, TURN_END])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=TURN_END, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama_config(
    vocab_size: int, *, hidden_size: int = 96, num_layers: int = 2, num_heads: int = 4
) -> LlamaConfig:
    """A Llama that two CPU cores train in seconds; its token ids are those of `byte_tokenizer`."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
