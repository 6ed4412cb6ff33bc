"""`dpo-ray pairs`: a model's own answers to prompts, ranked by a judge, as rows to train on.

Prompts go to parts; an actor of a Ray Data job answers and judges a part and writes its file. A file that is there is
never made again, so that the same command goes on where it stood.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_ray import storage
from dpo_ray.config import Config
from dpo_ray.errors import ConfigError, DataError, RowError
from dpo_ray.model.files import load_tokenizer
from dpo_ray.model.weights import weights_digest
from dpo_ray.orchestration.parts import make_parts
from dpo_ray.orchestration.rows import SUFFIXES, json_object, open_rows
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.pairs.formats import prompt_column
from dpo_ray.pairs.parsers import Fields, prompt_turns
from dpo_ray.pairs.render import require_chat_template
from dpo_ray.pairs.tokenize import tokenizer_digest

ANSWERED_TOGETHER = 8
SCORED_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Made:
    """What there is now.

    Attributes:
        uri: The folder of the rows' files.
        prompts: Prompts that were asked.
        rows: Rows that came of them.
        without: Prompts without two different answers that came to an end.
    """

    uri: str
    prompts: int
    rows: int
    without: int


def make_pairs(config: Config, watcher: Watcher | None = None) -> Made:
    """Samples answers, has them judged, and writes `<run>/pairs/part-*.jsonl`.

    Args:
        config: The run; its `pairs` says how.
        watcher: Told how far it is.

    Raises:
        ConfigError: Something is missing or does not fit; or there are parts that were made otherwise.
        DataError: A prompt cannot be read.
    """
    watcher, options = watcher or Watcher(), config.pairs
    if not options.prompts or options.judge is None:
        key = "judge" if options.prompts else "prompts"
        raise ConfigError(f"pairs.{key} is not set: say where {'the judge is' if key == 'judge' else 'prompts are'}")
    uri = storage.join(config.run_uri, "pairs")
    prompts = list(_prompts(config))
    parts = [
        prompts[start : start + options.prompts_per_part] for start in range(0, len(prompts), options.prompts_per_part)
    ]
    _settle(config, uri, prompts)
    missing = [index for index in range(len(parts)) if not storage.exists(storage.join(uri, _name(index)))]
    watcher.phase(
        f"{len(prompts):,} prompts in {len(parts):,} parts, {len(parts) - len(missing):,} of them done before"
    )
    if missing:
        items = [json.dumps({"index": index, "prompts": parts[index]}) for index in missing]
        make_parts(config, options, items, _Part, (config, uri), "sampling and judging", watcher)
    rows = sum(len(storage.read_json_lines(storage.join(uri, _name(index)))) for index in range(len(parts)))
    return Made(uri, len(prompts), rows, len(prompts) - rows)


def _name(index: int) -> str:
    return f"part-{index:06d}.jsonl"


def _prompts(config: Config) -> Iterator[list[dict[str, Any]]]:
    """The turns of each prompt, in the order of the files and their rows."""
    for pattern in config.pairs.prompts:
        for file in storage.expand(pattern):
            if not file.uri.endswith(SUFFIXES):
                raise DataError(f"{file.uri}: of an unknown kind; prompts are read from {', '.join(SUFFIXES)}")
            number = 0
            for texts, _ in open_rows(file.uri):
                for text in texts:
                    number += 1
                    try:
                        row = json_object(text)
                        column = config.data.columns.get("prompt") or prompt_column(row)
                        turns = prompt_turns(Fields(row, {"prompt": column}))
                        if turns[-1].role == "assistant":
                            raise RowError("the prompt ends with an assistant turn: end it with what is to be answered")
                        for key in (key for turn in turns for key in turn.extra or ()):
                            raise RowError(
                                f"a turn of the prompt has {key!r}, and the model is asked with roles and contents "
                                "alone: leave the row out"
                            )
                    except RowError as error:
                        raise DataError(f"{file.uri} row {number}: {error}") from None
                    yield [turn.as_dict() for turn in turns]


def _settle(config: Config, uri: str, prompts: Sequence[Any]) -> None:
    """Writes down how the parts are made, or sees that those that are there were made so.

    Raises:
        ConfigError: They were not; or the judge has another tokenizer than it must have.
    """
    options, judge = config.pairs, config.pairs.judge
    assert judge is not None
    digests = storage.join(config.store_uri, "digests")
    tokenizer = load_tokenizer(config.tokenizer_path)
    if config.data.chat_template == "tokenizer":
        require_chat_template(tokenizer)
    if options.label == "log_ratio" and tokenizer_digest(load_tokenizer(judge)) != tokenizer_digest(tokenizer):
        raise ConfigError(
            f"pairs.judge: {judge} has another tokenizer than the model: log-probabilities of the same tokens are "
            "compared; use label: reward_model, or a model with the same tokenizer"
        )
    said = options.model_dump(exclude={"prompts", "judge", "actors", "cpus_per_actor", "gpus_per_actor"})
    about = {
        **said,
        "seed": config.seed,
        "chat_template": config.data.chat_template,
        "chat_template_kwargs": config.data.chat_template_kwargs,
        "dtype": config.model.compute_dtype,
        "model": {"uri": config.model.path, "digest": weights_digest(config.model.path, digests)},
        "judge": {"uri": judge, "digest": weights_digest(judge, digests)},
        "tokenizer": tokenizer_digest(tokenizer),
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }
    place = storage.join(uri, "about.json")
    if not storage.exists(place):
        storage.write_json(place, about)
        return
    before = storage.read_json(place)
    changed = [key for key in about if before.get(key) != about[key]]
    if changed:
        raise ConfigError(
            f"{uri} has pairs that were made with other settings ({', '.join(changed)}): choose another name, or "
            "remove them"
        )


class _Part:
    """Answers and judges parts, in an actor."""

    def __init__(self, config: Config, uri: str) -> None:
        import torch

        from dpo_ray.model.sample import RewardModel, Sampler, Template

        options, device = config.pairs, torch.device("cuda" if config.pairs.gpus_per_actor else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(max(1, int(options.cpus_per_actor)))
        tokenizer = load_tokenizer(config.tokenizer_path)
        templated = config.data.chat_template == "tokenizer"
        template = Template(tokenizer, config.data.chat_template_kwargs if templated else None)
        generation = {
            "num_return_sequences": options.answers,
            "max_new_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
        }
        dtype, judge = config.model.compute_dtype, options.judge
        assert judge is not None
        self._config, self._uri = config, uri
        self._sampler = Sampler(config.model.path, template, dtype, device, generation)
        self._reward: RewardModel | None = None
        self._second: Any = None
        if options.label == "reward_model":
            self._reward = RewardModel(judge, dtype, device)
        else:
            self._second = Sampler(judge, template, dtype, device, generation)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        part = json.loads(batch["item"][0])
        rows = list[dict[str, Any]]()
        for start in range(0, len(part["prompts"]), ANSWERED_TOGETHER):
            prompts = part["prompts"][start : start + ANSWERED_TOGETHER]
            seed = _seed(self._config.seed, part["index"], start)
            for prompt, answers in zip(prompts, self._sampler.answers(prompts, seed), strict=True):
                if len(answers) > 1:
                    scores = self._scores(prompt, answers)
                    rows.append(self._row(prompt, [each.text for each in answers], scores))
        storage.write_json_lines(storage.join(self._uri, _name(part["index"])), rows)
        return {"index": [part["index"]]}

    def _scores(self, prompt: Any, answers: Sequence[Any]) -> list[float]:
        if self._reward is not None:
            return self._reward.scores(prompt, answers)
        from dpo_ray.reference.scorer import score_pairs
        from dpo_ray.types import TokenizedPair

        pair = TokenizedPair(b"", answers[0].prompt, tuple(each.tokens for each in answers))
        own, other = (
            score_pairs(each.model, [pair], SCORED_TOKENS, None, lambda: None)[0]
            for each in (self._sampler, self._second)
        )
        return [float(score) for score in own - other]

    def _row(self, prompt: Any, answers: list[str], scores: list[float]) -> dict[str, Any]:
        if self._config.pairs.choose == "all":
            return {"prompt": prompt, "answers": answers, "scores": scores}
        if self._config.pairs.choose == "best_worst":
            chosen, rejected = scores.index(max(scores)), scores.index(min(scores))
        else:
            draws = random.Random(_seed(self._config.seed, json.dumps(prompt)))
            chosen, rejected = draws.sample(range(len(answers)), 2)
            # Bradley-Terry: the one wins with probability sigma(difference).
            if draws.random() >= 1 / (1 + math.exp(min(500.0, scores[rejected] - scores[chosen]))):
                chosen, rejected = rejected, chosen
        return {
            "prompt": prompt,
            "chosen": answers[chosen],
            "rejected": answers[rejected],
            "chosen_score": scores[chosen],
            "rejected_score": scores[rejected],
        }


def _seed(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:7], "big")
