"""A judge behind an OpenAI-compatible endpoint: which of two answers is better, asked in both orders.

What it says is kept on storage by the content of the request, so that nothing is paid for twice: the same command
given again asks only what has no reply yet.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from dpo_ray import storage
from dpo_ray.config import EvaluationConfig
from dpo_ray.errors import ConfigError, JudgeError

ASKED_TOGETHER = 8
# A request that fails is sent again so often, after 0, 1, 2, 4 and 8 s, or when the server says, if that is soon.
RETRIES, BACKOFF_S, LONGEST_WAIT_S = 5, 0.5, 60
RETRIED_STATUS = (408, 409, 425, 429, 500, 502, 503, 504)
# A reply without a verdict is asked for again.
TRIES = 3
SHOWN_CHARS = 200
INSTRUCTIONS = (
    "You compare two answers to the same prompt. Judge how helpful, correct, harmless and to the point they are. Do "
    "not favour an answer for its length or for the place where it stands. Say in a sentence or two why, then end with "
    "your verdict on a line of its own: [[A]] if answer A is better, [[B]] if answer B is, [[C]] if neither is."
)
_VERDICT = re.compile(r"\[\[([ABC])\]\]")


@dataclass(frozen=True, slots=True)
class Question:
    """Two answers to a prompt.

    Attributes:
        prompt: As text.
        first: An answer.
        second: Another.
    """

    prompt: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Judged:
    """What the judge said of all questions.

    Attributes:
        outcomes: Of each question: 1 where the first answer is better in both orders, 0 where the second is, 1/2 for a
            tie, or where the two orders disagree; None where no reply had a verdict.
        disagreed: Questions whose verdict changed with the order.
        requests: Sent now; those that were answered before are not asked again.
        tokens: What the server counted for these.
    """

    outcomes: list[float | None]
    disagreed: int
    requests: int
    tokens: int


class _SpentError(Exception):
    """No request may be sent any more."""


class EndpointJudge:
    """A server that speaks OpenAI's chat completions."""

    def __init__(self, options: EvaluationConfig, cache_uri: str) -> None:
        """Asks nothing yet.

        Args:
            options: Where it is, and what it may cost.
            cache_uri: Where replies are kept.

        Raises:
            ConfigError: There is no key in the environment variable that is named.
        """
        self._options, self._cache_uri = options, cache_uri
        self._key = os.environ.get(options.key_variable) if options.key_variable else None
        if options.key_variable and not self._key:
            raise ConfigError(
                f"evaluation.key_variable is {options.key_variable}, but the environment has no such variable: set it "
                "to the judge's key, or leave evaluation.key_variable out for a server that wants none"
            )
        self._session = requests.Session()
        # Set even without a key: else requests would take one for the host from a .netrc file.
        self._session.auth = self._with_key
        retry = Retry(
            RETRIES,
            backoff_factor=BACKOFF_S,
            status_forcelist=RETRIED_STATUS,
            allowed_methods=["POST"],
            raise_on_status=False,
            retry_after_max=LONGEST_WAIT_S,
        )
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=ASKED_TOGETHER, max_retries=retry))
        self._lock = threading.Lock()
        self._requests = self._tokens = self._tokens_under_way = 0

    def judge(
        self, questions: Sequence[Question], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Judged:
        """Asks about all questions, in both orders, what has no reply yet.

        Args:
            questions: Equal answers are a tie without being asked about.
            progress: Told how many replies there are, of how many.

        Raises:
            JudgeError: The server does not answer, or the limits are reached; all replies so far are kept.
            ConfigError: The server refuses what it is asked.
        """
        asked = [(number, swap) for number, each in enumerate(questions) for swap in (False, True)]
        asked = [each for each in asked if questions[each[0]].first != questions[each[0]].second]
        verdicts: dict[tuple[int, bool], str | None] = {}
        error: Exception | None = None
        pool = ThreadPoolExecutor(ASKED_TOGETHER)
        try:
            left, under_way = iter(asked), dict[Any, tuple[int, bool]]()
            while True:
                for number, swap in itertools.islice(left, 0 if error else ASKED_TOGETHER - len(under_way)):
                    under_way[pool.submit(self._verdict, questions[number], swap)] = number, swap
                if not under_way:
                    break
                for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                    each = under_way.pop(done)
                    try:
                        verdicts[each] = done.result()
                    except (_SpentError, JudgeError, ConfigError) as raised:
                        error = error or raised
                progress(len(verdicts), len(asked))
        finally:
            # Who interrupts does not wait for replies.
            pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, _SpentError):
            raise JudgeError(
                f"the judge was sent {self._requests:,} requests for {self._tokens:,} tokens, as many as "
                f"evaluation.max_requests and max_tokens allow: {_kept(verdicts, asked)}; raise them, or give the same "
                "command again"
            )
        if isinstance(error, JudgeError):
            raise JudgeError(f"{error}: {_kept(verdicts, asked)}; give the same command again")
        if error is not None:
            raise error
        return self._judged(questions, verdicts)

    def _judged(self, questions: Sequence[Question], verdicts: Mapping[tuple[int, bool], str | None]) -> Judged:
        outcomes, disagreed = list[float | None](), 0
        values = {"A": 1.0, "B": 0.0, "C": 0.5}
        for number, each in enumerate(questions):
            if each.first == each.second:
                outcomes.append(0.5)
                continue
            straight, swapped = verdicts[number, False], verdicts[number, True]
            if straight is None or swapped is None:
                outcomes.append(None)
                continue
            one, other = values[straight], 1 - values[swapped]
            disagreed += one != other
            outcomes.append(one if one == other else 0.5)
        return Judged(outcomes, disagreed, self._requests, self._tokens)

    def _verdict(self, question: Question, swap: bool) -> str | None:
        """A, B or C for the answers in the order in which they are shown; None where no reply had one."""
        first, second = (question.second, question.first) if swap else (question.first, question.second)
        shown = f"[Prompt]\n{question.prompt}\n\n[Answer A]\n{first}\n\n[Answer B]\n{second}\n\n[Your verdict]"
        body = {
            "model": self._options.endpoint_model,
            "messages": [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": shown}],
            "temperature": 0.0,
            "max_tokens": self._options.reply_tokens,
        }
        about = {"endpoint": self._options.endpoint, "request": body}
        place = storage.join(self._cache_uri, f"{storage.fingerprint(about)}.json")
        if storage.exists(place):
            return str(storage.read_json(place)["verdict"])
        for _ in range(TRIES):
            text, tokens = self._ask(body)
            if found := _VERDICT.findall(text):
                kept = {"endpoint": self._options.endpoint, "model": self._options.endpoint_model, "reply": text}
                storage.write_json(place, {**kept, "verdict": found[-1], "tokens": tokens})
                return str(found[-1])
        return None

    def _ask(self, body: Mapping[str, Any]) -> tuple[str, int]:
        """The server's reply, and the tokens it counted; the empty text where it is not what the protocol says."""
        options = self._options
        # What it may take at most, a token being some four characters: the limit holds for what is under way too.
        expected = options.reply_tokens + sum(len(message["content"]) for message in body["messages"]) // 4
        with self._lock:
            tokens = self._tokens + self._tokens_under_way + expected
            if self._requests >= options.max_requests or tokens > (options.max_tokens or 2**62):
                raise _SpentError
            self._requests += 1
            self._tokens_under_way += expected
        counted = 0
        try:
            text, counted = self._reply(body, expected)
        finally:
            with self._lock:
                self._tokens_under_way -= expected
                self._tokens += counted
        return text, counted

    def _reply(self, body: Mapping[str, Any], expected: int) -> tuple[str, int]:
        options, endpoint = self._options, str(self._options.endpoint)
        try:
            answer = self._session.post(
                f"{endpoint.rstrip('/')}/chat/completions", json=body, timeout=options.timeout_s, allow_redirects=False
            )
        except requests.RequestException as error:
            raise JudgeError(f"the judge at {endpoint} does not answer: {self._shown(error)}") from None
        if answer.status_code in RETRIED_STATUS:
            raise JudgeError(f"the judge at {endpoint} says {answer.status_code} again and again")
        if answer.status_code != 200:
            raise ConfigError(
                f"the judge at {endpoint} refuses with {answer.status_code}: {self._shown(answer.text)}; see to "
                "evaluation.endpoint, endpoint_model and key_variable"
            )
        try:
            reply = answer.json()
            text, tokens = reply["choices"][0]["message"]["content"], (reply.get("usage") or {}).get("total_tokens")
        except (ValueError, LookupError, TypeError, AttributeError):
            return "", 0
        # A server that does not count is taken to use all that it may.
        return text if isinstance(text, str) else "", tokens if isinstance(tokens, int) else expected

    def _with_key(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _shown(self, said: object) -> str:
        """What a server says may have the key in it."""
        text = str(said)
        return (text.replace(self._key, "...") if self._key else text)[:SHOWN_CHARS]


def _kept(verdicts: Mapping[Any, Any], asked: Sequence[Any]) -> str:
    return f"{len(verdicts):,} of {len(asked):,} replies are there and kept"
