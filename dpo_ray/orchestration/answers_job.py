"""Answers of several models to the same held-out prompts, and the scores of a reward model.

Prompts go to parts; an actor of a Ray Data job answers a part with a model and writes its file. A file that is there is
never made again, so that the same command goes on where it stood.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.errors import ConfigError, first_line
from dpo_ray.model.files import load_tokenizer
from dpo_ray.model.weights import weights_digest
from dpo_ray.orchestration.originals import Originals
from dpo_ray.orchestration.parts import make_parts
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.pairs.store import Chunk, PairStore, read_chunk, sources_of
from dpo_ray.pairs.tokenize import tokenizer_digest

ANSWERED_TOGETHER = 8
# Pairs at a time, while prompts are chosen.
MOST_LOOKED_AT = 10_000
SCORED_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Prompt:
    """A held-out prompt.

    Attributes:
        pair_id: Of the pair that it is of, in hex.
        turns: As turns; without a chat template one of them, with the text.
    """

    pair_id: str
    turns: list[dict[str, str]]

    @property
    def text(self) -> str:
        """For a judge."""
        if len(self.turns) == 1:
            return self.turns[0]["content"]
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Model:
    """A model that answers.

    Attributes:
        name: For people.
        path: transformers directory.
        tokenizer: Directory of its tokenizer.
        against: Another model, to which its KL divergence is estimated; or None.
    """

    name: str
    path: str
    tokenizer: str
    against: str | None = None


def held_out_prompts(config: Config, pairs: PairStore, watcher: Watcher) -> list[Prompt]:
    """`evaluation.prompts` different held-out prompts, as many of each held-out set as of the others.

    Of a set they are the first in store order, which is a shuffled one. Prompts longer than training reads are not
    asked.

    Args:
        config: The run.
        pairs: Its pair store.
        watcher: Told how many there are.

    Raises:
        ConfigError: None can be asked.
    """
    by_set: dict[int, list[Chunk]] = {}
    for chunk in pairs.eval:
        by_set.setdefault(chunk.source, []).append(chunk)
    originals = Originals(config, pairs.uri) if config.data.chat_template == "tokenizer" else None
    waiting = deque(_prompts(config, pairs, chunks, originals) for chunks in by_set.values())
    found, seen, wanted = list[Prompt](), set[bytes](), config.evaluation.prompts
    while waiting and len(found) < wanted:
        of_set = waiting.popleft()
        for tokens, prompt in of_set:
            if tokens not in seen:
                seen.add(tokens)
                found.append(prompt)
                waiting.append(of_set)
                watcher.progress("choosing prompts", len(found), wanted)
                break
    if not found:
        raise ConfigError(
            "evaluation.prompts: no held-out prompt can be asked: their files are gone or have changed, or all of "
            "them are tokens, raw texts, too long, or have tools; set evaluation.prompts: 0"
        )
    return found


def _prompts(
    config: Config, pairs: PairStore, chunks: Sequence[Chunk], originals: Originals | None
) -> Iterator[tuple[bytes, Prompt]]:
    """What can be asked of some chunks, each with its tokens.

    Args:
        config: The run.
        pairs: Its pair store.
        chunks: Which.
        originals: Where turns are read; None: a prompt is its own text.
    """
    from dpo_ray.model.sample import Template  # With torch.

    tokenizer, data = load_tokenizer(config.tokenizer_path), config.data
    longest = min((each for each in (data.max_prompt_length, data.max_length) if each), default=None)
    template = Template(tokenizer, data.chat_template_kwargs)
    candidates = (
        (pair, place)
        for chunk in chunks
        for places in (sources_of(pairs.uri, chunk) if originals else {},)
        for pair in read_chunk(pairs.uri, chunk)
        for place in (places.get(pair.pair_id, ""),)
        if originals is None or originals.has_turns(place)
    )
    # A look reads whole files: where few of the prompts can be asked, or many are the same, it takes more each time.
    size = config.evaluation.prompts
    while some := list(itertools.islice(candidates, size)):
        turns = originals.turns([place for _, place in some]) if originals else {}
        for pair, place in some:
            if originals is None:
                asked = [{"role": "user", "content": str(tokenizer.decode(pair.prompt, skip_special_tokens=True))}]
            elif place in turns:
                asked = turns[place]
                text = template.text(asked, ask=True)
                if longest and len(tokenizer(text, add_special_tokens=False)["input_ids"]) > longest:
                    continue
            else:
                continue
            yield pair.prompt.tobytes(), Prompt(pair.pair_id.hex(), asked)
        size = min(2 * size, MOST_LOOKED_AT)


def answers_of(
    config: Config, prompts: Sequence[Prompt], models: Sequence[Model], watcher: Watcher
) -> list[list[dict[str, Any]]]:
    """Each model's answer to each prompt, by model, in the order of the prompts.

    They are lines of `<run>/evaluation/answers/<fingerprint>/part-*.jsonl`: the pair's id, the prompt, the
    answer and its tokens, whether it came to an end; and of a model with one to compare `kl_k1` and `kl_k3`, see `_kl`.

    Raises:
        ConfigError: A model cannot be loaded.
    """
    options, folders = config.evaluation, list[str]()
    _check_templates(config, prompts, models)
    for model in models:
        digests = storage.join(config.store_uri, "digests")
        about = {
            "format": 1,
            "model": weights_digest(model.path, digests),
            "against": weights_digest(model.against, digests) if model.against else None,
            "tokenizer": tokenizer_digest(load_tokenizer(model.tokenizer)),
            "dtype": config.model.compute_dtype,
            "seed": config.seed,
            "chat_template": [config.data.chat_template, config.data.chat_template_kwargs],
            **options.model_dump(include={"max_new_tokens", "temperature", "top_p", "prompts_per_part"}),
            "prompts": storage.fingerprint([prompt.turns for prompt in prompts]),
        }
        folders.append(storage.join(config.run_uri, "evaluation", "answers", storage.fingerprint(about)))
        storage.write_json(storage.join(folders[-1], "about.json"), {**about, "name": model.name, "uri": model.path})
    items = [
        {"model": number, "uri": folder, "part": part}
        for number, folder in enumerate(folders)
        for part in range(_num_parts(config, prompts))
    ]
    return _parts(
        config, folders, items, prompts, _Answers, (config, list(models), list(prompts)), "answering", watcher
    )


def _check_templates(config: Config, prompts: Sequence[Prompt], models: Sequence[Model]) -> None:
    """Refuses models that the prompts cannot be put to."""
    from dpo_ray.model.sample import Template

    if config.data.chat_template != "tokenizer":
        return
    for uri in dict.fromkeys(model.tokenizer for model in models):
        template = Template(load_tokenizer(uri), config.data.chat_template_kwargs)
        for prompt in prompts:
            try:
                template.text(prompt.turns, ask=True)
            except Exception as error:
                raise ConfigError(
                    f"{uri}: its chat template cannot ask the prompt of pair {prompt.pair_id} ({first_line(error)}): "
                    "leave the model out of evaluation.models, or give its tokenizer another template"
                ) from None


def rewards_of(
    config: Config, prompts: Sequence[Prompt], answers: Sequence[Sequence[Mapping[str, Any]]], watcher: Watcher
) -> np.ndarray:
    """The reward model's score of each answer: Shape (models, prompts).

    Raises:
        ConfigError: The reward model cannot be loaded.
    """
    path = config.evaluation.reward_model
    assert path is not None
    digest, folders = weights_digest(path, storage.join(config.store_uri, "digests")), list[str]()
    for each in answers:
        about = {"judge": digest, "dtype": config.model.compute_dtype, "parts": config.evaluation.prompts_per_part}
        texts = [[prompt.turns, answer["answer"]] for prompt, answer in zip(prompts, each, strict=True)]
        name = storage.fingerprint({**about, "texts": storage.fingerprint(texts)})
        folders.append(storage.join(config.run_uri, "evaluation", "rewards", name))
    items = [
        {"model": number, "uri": folder, "part": part}
        for number, folder in enumerate(folders)
        for part in range(_num_parts(config, prompts))
    ]
    arguments = (config, list(prompts), [list(each) for each in answers])
    found = _parts(config, folders, items, prompts, _Rewards, arguments, "judging", watcher)
    return np.array([[line["reward"] for line in each] for each in found])


def _num_parts(config: Config, prompts: Sequence[Prompt]) -> int:
    return -(-len(prompts) // config.evaluation.prompts_per_part)


def _parts(
    config: Config,
    folders: Sequence[str],
    items: Sequence[dict[str, Any]],
    prompts: Sequence[Prompt],
    actor: type,
    arguments: tuple[Any, ...],
    doing: str,
    watcher: Watcher,
) -> list[list[dict[str, Any]]]:
    """Has the parts made that are not there, and reads all of them: the lines of each folder."""
    missing = [item for item in items if not storage.exists(_place(item))]
    if missing:
        about = config, config.evaluation, [json.dumps(item) for item in missing]
        make_parts(*about, actor, arguments, doing, watcher)
    by_folder = {folder: [item for item in items if item["uri"] == folder] for folder in folders}
    return [
        [
            line
            for item in by_folder[folder][: _num_parts(config, prompts)]
            for line in storage.read_json_lines(_place(item))
        ]
        for folder in folders
    ]


def _place(item: Mapping[str, Any]) -> str:
    return storage.join(item["uri"], f"part-{item['part']:06d}.jsonl")


class _Answers:
    """Answers parts, in an actor; holds one model at a time."""

    def __init__(self, config: Config, models: Sequence[Model], prompts: Sequence[Prompt]) -> None:
        self._config, self._models, self._prompts = config, models, prompts
        self._sampler: Any = None
        self._other: Any = None
        self._loaded: int | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        item = json.loads(batch["item"][0])
        if item["model"] != self._loaded:
            self._load(item["model"])
        model, size = self._models[item["model"]], self._config.evaluation.prompts_per_part
        prompts = self._prompts[item["part"] * size : (item["part"] + 1) * size]
        lines = list[dict[str, Any]]()
        for start in range(0, len(prompts), ANSWERED_TOGETHER):
            some = prompts[start : start + ANSWERED_TOGETHER]
            # The same for all models.
            seed = _seed(self._config.seed, item["part"], start)
            for prompt, (answer,) in zip(some, self._sampler.sampled([each.turns for each in some], seed), strict=True):
                line = {"pair_id": prompt.pair_id, "prompt": prompt.turns, "model": model.path, "answer": answer.text}
                line |= {
                    "tokens": len(answer.tokens),
                    "token_ids": answer.tokens.tolist(),
                    "ended": answer.ended,
                    "seed": seed,
                }
                lines.append(line | self._kl(answer))
        storage.write_json_lines(_place(item), lines)
        return {"part": [item["part"]]}

    def _load(self, number: int) -> None:
        import torch

        from dpo_ray.model.sample import Sampler, Template

        self._sampler = self._other = None  # Their memory first.
        options, model = self._config.evaluation, self._models[number]
        device = _device(self._config)
        templated = self._config.data.chat_template == "tokenizer"
        generation = options.model_dump(include={"max_new_tokens", "temperature", "top_p"})

        def loaded(path: str, tokenizer: str) -> Sampler:
            kwargs = self._config.data.chat_template_kwargs if templated else None
            template = Template(load_tokenizer(tokenizer), kwargs)
            return Sampler(path, template, self._config.model.compute_dtype, device, generation)

        self._sampler = loaded(model.path, model.tokenizer)
        self._other = loaded(model.against, model.tokenizer) if model.against else None
        self._loaded = number
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _kl(self, answer: Any) -> dict[str, float]:
        """Two estimates of the KL divergence to the other model from an answer that was drawn, nats, over its tokens.

        With r = log pi - log pi_ref of a token, k1 is the sum of r, k3 that of exp(-r) - 1 + r. Given what stands
        before it both are unbiased for a token's divergence, and so their sums are for that of answers up to
        `max_new_tokens`. k3 is never negative, and varies less where the models are near each other.

        Source: J. Schulman, "Approximating KL divergence".
        """
        if self._other is None:
            return {}
        from dpo_ray.reference.scorer import score_pairs
        from dpo_ray.types import TokenizedPair

        pair = TokenizedPair(b"", answer.prompt, (answer.tokens,))
        own, other = (
            score_pairs(each.model, [pair], SCORED_TOKENS, None, lambda: None, per_token=True)[0].astype(np.float64)
            for each in (self._sampler, self._other)
        )
        ratio = own - other
        return {"kl_k1": float(ratio.sum()), "kl_k3": float((np.expm1(-ratio) + ratio).sum())}


class _Rewards:
    """Scores parts with a reward model, in an actor."""

    def __init__(
        self, config: Config, prompts: Sequence[Prompt], answers: Sequence[Sequence[Mapping[str, Any]]]
    ) -> None:
        from dpo_ray.model.sample import RewardModel

        assert config.evaluation.reward_model is not None
        self._size, self._prompts, self._answers = config.evaluation.prompts_per_part, prompts, answers
        self._judge = RewardModel(config.evaluation.reward_model, config.model.compute_dtype, _device(config))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        from dpo_ray.model.sample import Sampled

        item, nothing = json.loads(batch["item"][0]), np.zeros(0, np.int32)
        some = range(item["part"] * self._size, min(len(self._prompts), (item["part"] + 1) * self._size))
        lines = []
        for index in some:
            answer = Sampled(self._answers[item["model"]][index]["answer"], nothing, nothing)
            (reward,) = self._judge.scores(self._prompts[index].turns, [answer])
            lines.append({"pair_id": self._prompts[index].pair_id, "reward": reward})
        storage.write_json_lines(_place(item), lines)
        return {"part": [item["part"]]}


def _device(config: Config) -> Any:
    import torch

    device = torch.device("cuda" if config.evaluation.gpus_per_actor else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(config.evaluation.cpus_per_actor)))
    return device


def _seed(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:7], "big")
