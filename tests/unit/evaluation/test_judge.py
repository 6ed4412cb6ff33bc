"""The judge behind an endpoint, against a real server process: what it says, costs, keeps, and survives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import JudgeServer

from dpo_ray.config import EvaluationConfig
from dpo_ray.errors import ConfigError, JudgeError
from dpo_ray.evaluation import judge as judging
from dpo_ray.evaluation.judge import EndpointJudge, Question

pytestmark = pytest.mark.integration

KEY = "secret-key-of-the-judge"
QUESTIONS = [
    Question("first wins", "good good", "good"),
    Question("second wins", "bad", "good"),
    Question("tie", "good", "good."),
    Question("biased: the order decides", "good", "bad"),
    Question("the same answer", "good", "good"),
]
OUTCOMES = [1.0, 0.0, 0.5, 0.5, 0.5]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JudgeServer]:
    with JudgeServer(tmp_path_factory.mktemp("judge")) as server:
        yield server


@pytest.fixture
def server(running: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> JudgeServer:
    monkeypatch.setattr(judging, "BACKOFF_S", 0.01)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    running.faults()
    return running


def judge_of(url: str, cache: Path, **options: Any) -> EndpointJudge:
    named = {"judge": "endpoint", "endpoint": f"{url}/v1", "endpoint_model": "judge-1", "key_variable": "JUDGE_KEY"}
    return EndpointJudge(EvaluationConfig.model_validate({**named, **options}), str(cache))


def test_verdicts_of_both_orders_are_kept(server: JudgeServer, tmp_path: Path) -> None:
    """Four of five questions are asked, twice each; a verdict for the place is a tie; nothing is asked again."""
    told = list[tuple[int, int]]()
    found = judge_of(server.url, tmp_path).judge(QUESTIONS, lambda done, total: told.append((done, total)))
    assert found.outcomes == OUTCOMES
    assert (found.disagreed, found.requests, found.tokens) == (1, 8, 80)
    assert told[-1] == (8, 8)
    seen = server.seen()
    assert {(each["path"], each["key"], each["body"]["model"]) for each in seen} == {
        ("/v1/chat/completions", f"Bearer {KEY}", "judge-1")
    }
    again = judge_of(server.url, tmp_path).judge(QUESTIONS)
    assert (again.outcomes, again.requests) == (OUTCOMES, 0)
    assert len(server.seen()) == 8
    # Another judge's word is another's.
    assert judge_of(server.url, tmp_path, endpoint_model="judge-2").judge(QUESTIONS[:1]).requests == 2
    assert not any(KEY in path.read_text() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 503},
        {"kind": "status", "status": 429},
        {"kind": "drop"},
        {"kind": "hang", "seconds": 1.5},
        {"kind": "nonsense"},
        {"kind": "mute"},
    ],
)
def test_what_passes_is_asked_again(server: JudgeServer, tmp_path: Path, fault: dict[str, Any]) -> None:
    server.faults({**fault, "times": 2})
    assert judge_of(server.url, tmp_path, timeout_s=0.5).judge(QUESTIONS).outcomes == OUTCOMES
    assert len(server.seen()) == 10


def test_a_judge_that_says_nothing_leaves_a_comparison_open(server: JudgeServer, tmp_path: Path) -> None:
    """Three times per order; without a verdict nothing is kept, and it is asked the next time."""
    server.faults({"kind": "mute", "times": 6})
    assert judge_of(server.url, tmp_path).judge(QUESTIONS[:1]).outcomes == [None]
    assert not list(tmp_path.iterdir())
    assert judge_of(server.url, tmp_path).judge(QUESTIONS[:1]).outcomes == [1.0]


def test_an_outage_is_reported_and_nothing_is_lost(server: JudgeServer, tmp_path: Path) -> None:
    many = [Question(f"number {number}", "good", "bad") for number in range(20)]
    assert judge_of(server.url, tmp_path).judge(many[:8]).requests == 16
    server.faults({"kind": "status", "status": 500, "times": 1000})
    message = r"judge at http.*/v1 says 500 again and again: 16 of 40 replies are there and kept; give the same command"
    with pytest.raises(JudgeError, match=message):
        judge_of(server.url, tmp_path).judge(many)
    # Those under way are tried six times each; no others are sent.
    assert len(server.seen()) <= 8 * 6
    server.faults()
    found = judge_of(server.url, tmp_path).judge(many)
    assert (found.outcomes, found.requests) == ([1.0] * 20, 24)
    with pytest.raises(JudgeError, match="the judge at http://127.0.0.1:9/v1 does not answer: .*0 of 2 replies"):
        judge_of("http://127.0.0.1:9", tmp_path / "other").judge(many[:1])


def test_a_server_that_says_when_is_not_waited_for_that_long(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day's quota is used up: an hour is not slept through, six times."""
    monkeypatch.setattr(judging, "LONGEST_WAIT_S", 0)
    server.faults({"kind": "status", "status": 429, "after": 3600, "times": 1000})
    with pytest.raises(JudgeError, match="says 429 again and again"):
        judge_of(server.url, tmp_path).judge(QUESTIONS[:1])
    assert len(server.seen()) == 2 * 6


def test_the_limits_hold(server: JudgeServer, tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"sent 3 requests for 30 tokens.*: 3 of 8 replies are there and kept; raise"):
        judge_of(server.url, tmp_path, max_requests=3).judge(QUESTIONS)
    assert len(server.seen()) == 3
    # A reply may have 256 tokens, and the question has some too.
    with pytest.raises(JudgeError, match="sent 0 requests for 0 tokens, as many as evaluation.max_requests and max_"):
        judge_of(server.url, tmp_path, max_tokens=256).judge(QUESTIONS)
    assert len(server.seen()) == 3
    found = judge_of(server.url, tmp_path, max_tokens=10_000).judge(QUESTIONS)
    assert (found.outcomes, found.requests, found.tokens) == (OUTCOMES, 5, 50)


def test_mistakes_are_one_message_without_the_key(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's refusal repeats the key that it was given: it is not shown."""
    server.faults({"kind": "status", "status": 401, "times": 1000})
    with pytest.raises(ConfigError, match=r"refuses with 401: no: Bearer \.\.\.; see to") as refused:
        judge_of(server.url, tmp_path).judge(QUESTIONS)
    assert KEY not in str(refused.value)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="evaluation.key_variable is JUDGE_KEY, but the environment has no such"):
        judge_of(server.url, tmp_path)
    server.faults()
    assert judge_of(server.url, tmp_path, key_variable=None).judge(QUESTIONS[:1]).outcomes == [1.0]
    assert server.seen()[0]["key"] is None
