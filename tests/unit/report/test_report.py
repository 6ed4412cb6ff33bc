"""A run's page: what it says of runs whose numbers are known, and that what runs bring stays text."""

import json
import os
import re
import time
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from run_folders import Began, add_evaluation, make_run

from dpo_ray import storage
from dpo_ray.errors import ConfigError, RecoveryError, StoppedError
from dpo_ray.lease import RunLease
from dpo_ray.pairs.statistics import describe
from dpo_ray.pairs.store import open_store
from dpo_ray.report.answers import marked
from dpo_ray.report.charts import number
from dpo_ray.report.facts import read_facts, step_parts
from dpo_ray.report.page import (
    LENGTH_BINS,
    SHOWN_CHARS,
    SHOWN_MARKS,
    SHOWN_NEWEST,
    comparison_page,
    duration,
    run_page,
    write_comparison,
    write_data_page,
    write_report,
)
from dpo_ray.training.faults import Fault

PLANTED = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'"
FAULTS = (
    Began(0, "start"),
    Began(10, "a worker's process died"),
    Began(20, "1 node with workers died"),
    Began(30, "rank 1 stood still", generation=2),
)


class Page(HTMLParser):
    """What a browser would make of a page: its tags, ids and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.ids, self.links = list[str](), list[str](), list[str]()
        self.attributes, self.headings, self.words = set[str](), list[int](), list[str]()
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name == "href"]
        if len(tag) == 2 and tag[0] == "h" and tag[1].isdigit():
            self.headings.append(int(tag[1]))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_facts_of_a_finished_run(tmp_path: Path) -> None:
    """40 steps of 1 s, 10 s more for the first: the numbers of `make_run`, summed by hand."""
    facts = read_facts(make_run(tmp_path))
    assert (facts.status.state, facts.num_steps, facts.total_steps) == ("finished", 40, 40)
    assert (facts.pairs_trained, facts.steps_s, facts.pairs_per_s) == (320, 50.0, 320 / 50)
    assert {name: float(np.sum(each)) for name, each in step_parts(facts).items()} == pytest.approx(
        {
            "computing": 50 - 20 - 0.75,
            "waiting for data": 20 - 5,
            "waiting for the reference": 5,
            "evaluation": 3 * 0.125,
            "checkpoint": 3 * 0.125,
        }
    )
    (held,) = facts.held_out
    assert (held.first_step, held.last_step) == (10, 40)
    assert held.rows["rewards/margins"] == (0.0, 1.0, 4.0)
    # The reference's log-probability, from the last evaluation's: -22 - (-0.2) / 0.1.
    assert held.rows["logps/chosen"] == (pytest.approx(-20.0), -20.5, -22.0)
    assert held.rows["logps/rejected"] == (pytest.approx(-30.0), pytest.approx(-40.5), pytest.approx(-72.0))
    assert held.rows["rewards/accuracies"] == (None, 0.75, 0.75)
    assert facts.chosen is not None
    assert facts.chosen.falls
    assert facts.data is not None
    assert facts.data.statistics is not None
    assert facts.data.statistics.rejects == {"the answer <script>alert(_)</script> is empty": 1}


def test_another_reference_says_nothing_of_the_start(tmp_path: Path) -> None:
    """Rewards are then no log-ratio to the policy's start: the first evaluation is the earliest that is known."""
    facts = read_facts(make_run(tmp_path, reference={"path": "elsewhere"}))
    assert facts.held_out[0].rows["logps/chosen"] == (None, -20.5, -22.0)
    assert facts.chosen is not None
    assert (facts.chosen.before, facts.chosen.after) == (-20.5, -22.0)


def test_the_warning_of_falling_chosen_answers(tmp_path: Path) -> None:
    falls, rises = (
        run_page(read_facts(make_run(tmp_path, name, chosen_falls=name == "falls"))) for name in ("falls", "rises")
    )
    assert "have become less likely:" in falls
    assert "fell from −20 to −22 nats" in Page(falls).text.replace("\n", " ")
    assert "have become less likely:" not in rises
    assert "have not become less likely" in rises


def test_three_faults_are_shown(tmp_path: Path) -> None:
    """With a driver that was killed between the last two attempts, which left no word of its end."""
    facts = read_facts(make_run(tmp_path, began=FAULTS))
    assert [(each.position, each.steps, each.steps_s) for each in facts.attempts] == [
        (position, 10, 20.0) for position in (0, 10, 20, 30)
    ]
    page = run_page(facts)
    text = Page(page).text
    for each in FAULTS:
        assert each.reason in text
    # Faults are on the charts of steps, not on that of the data.
    assert page.count('class="mark"') == 3 * (page.count('class="chart"') - 1)
    assert "attempt 2 began after step 20: 1 node with workers died" in page


def test_faults_that_ended_no_attempt(tmp_path: Path) -> None:
    """On the time axis, of 180 s and the last attempt's 20; one before the first group began is at its left."""
    run = make_run(tmp_path, began=FAULTS, ended=False)
    times = ("2026-01-01T00:01:30+00:00", "2026-01-01T00:02:30+00:00")
    lost = [Fault(time, f"a replica was lost: {number}") for number, time in enumerate(times)]
    early = Fault("2025-12-31T23:59:00+00:00", "a replica was lost early")
    (Path(run) / "faults.jsonl").write_text("".join(json.dumps(asdict(each)) + "\n" for each in (early, *lost)))
    page = run_page(read_facts(run))
    assert re.findall(r'<i style="left: ([0-9.]+)%" title="([^"]*)">', page) == [
        ("0.0", "a replica was lost early"),
        ("45.0", "a replica was lost: 0"),
        ("75.0", "a replica was lost: 1"),
    ]
    assert "2026-01-01 00:01:30 UTC: a replica was lost: 0" in Page(page).text


def test_why_a_run_failed(tmp_path: Path) -> None:
    error = RecoveryError("rank 1: ValueError: 17: failure 4 of this kind since step 12\nTraceback: line 1\nline 2")
    facts = read_facts(make_run(tmp_path, steps=12, error=error))
    assert facts.status.state == "failed"
    text = Page(run_page(facts)).text
    assert "✗ Failed rank 1: ValueError: 17: failure 4 of this kind since step 12." in text
    assert "RecoveryError" in text
    assert "Traceback: line 1 line 2" in text
    assert "12 of 40" in text


def test_how_a_run_stands(tmp_path: Path) -> None:
    """A record of a driver's end is worth nothing once a newer driver has taken the run."""
    stopped = make_run(tmp_path, "stopped", steps=5, error=StoppedError("stopped by SIGTERM", 15))
    assert read_facts(stopped).status.state == "stopped"
    unknown = make_run(tmp_path, "unknown", steps=5, ended=False)
    assert read_facts(unknown).status.state == "unknown"
    running = make_run(tmp_path, "running", steps=5, error=RecoveryError("long ago"))
    for _ in range(2):
        with RunLease(running) as lease:
            pass
    with RunLease(running) as lease:
        assert read_facts(running).status.state == "running"
        place = storage.join(running, "lease", f"{lease.generation:08d}.json")
        holder = storage.read_json(place)
        assert f"process {os.getpid()}" in read_facts(running).status.text
        # The same number, started at another time: that process is gone.
        storage.write_json(place, {**holder, "process_start": "1"})
        assert read_facts(running).status.state == "dead"
    with pytest.raises(ConfigError, match="no run is there; give a run's folder"):
        read_facts(str(tmp_path / "nothing"))


def test_a_run_that_failed_before_it_began(tmp_path: Path) -> None:
    """Its folder holds nothing but the record of its end."""
    from dpo_ray.training.outcome import write_outcome

    write_outcome(str(tmp_path / "early"), 1, RecoveryError("the pairs were gone"))
    text = Page(storage.read_bytes(write_report(str(tmp_path / "early"))).decode()).text
    assert "✗ Failed the pairs were gone." in text


def test_what_runs_bring_stays_text(tmp_path: Path) -> None:
    """Script in the run's name, its configuration, a reason, an error, a reject, a checkpoint and a file name."""
    run = make_run(
        tmp_path, began=(Began(0, "start"), Began(10, PLANTED)), error=RecoveryError(f"{PLANTED}\n{PLANTED}")
    )
    described = yaml.safe_load((Path(run) / "config.yaml").read_text())
    described["config"]["name"] = described["config"]["model"]["path"] = PLANTED
    described["about"]["versions"] = {PLANTED: PLANTED}
    described["about"]["code"] = {PLANTED: PLANTED}
    (Path(run) / "config.yaml").write_text(yaml.safe_dump(described))
    storage.write_json(storage.join(run, "checkpoints", "step-00000010", "set-aside-0000.json"), {"reason": PLANTED})
    storage.write_bytes(storage.join(run, "hangs", "<script>.txt"), b"")
    lines = storage.read_json_lines(storage.join(run, "metrics.jsonl"))
    for line in lines:
        if "eval_loss" in line:
            line[f"eval_{PLANTED}_loss"] = 1.0
            line[f"eval_{PLANTED}_rewards/margins"] = 1.0
        else:
            line[f"memory {PLANTED}"] = 1.0
    storage.write_json_lines(storage.join(run, "metrics.jsonl"), lines)
    other = make_run(tmp_path, "other")
    for html in (run_page(read_facts(run)), comparison_page([read_facts(run), read_facts(other)])):
        page = Page(html)
        assert not {"script", "img", "iframe", "object", "link", "form"} & set(page.tags)
        assert not {name for name in page.attributes if name.startswith("on") or name == "src"}
        assert PLANTED in " ".join(page.words)


@pytest.mark.parametrize("compare", [False, True])
def test_structure(tmp_path: Path, compare: bool) -> None:
    """One main landmark, headings without gaps, ids once, links that lead somewhere, nothing fetched."""
    facts = read_facts(make_run(tmp_path, began=FAULTS))
    html = comparison_page([facts, read_facts(make_run(tmp_path, "other"))]) if compare else run_page(facts)
    page = Page(html)
    assert page.headings[0] == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert [page.tags.count(tag) for tag in ("main", "header", "footer", "nav", "h1")] == [1, 1, 1, 1, 1]
    assert len(page.ids) == len(set(page.ids))
    assert all(link.removeprefix("#") in page.ids for link in page.links)
    assert page.tags.count("figure") == html.count('role="img"') == html.count("in numbers</summary>") >= 8
    assert "url(" not in html
    assert "http" not in html.replace("http-equiv", "")


def test_a_hundred_thousand_steps_make_a_small_page(tmp_path: Path) -> None:
    """With one spike among them, in which the loss is 50 times what it is elsewhere."""
    run = make_run(tmp_path, steps=1000, total=100_000)
    lines = [line for line in storage.read_json_lines(storage.join(run, "metrics.jsonl")) if "loss" in line]
    many = [{**lines[step % 1000], "step": step + 1} for step in range(100_000)]
    many[54_321]["loss"] = 50.0
    storage.write_json_lines(storage.join(run, "metrics.jsonl"), many)
    page = run_page(read_facts(run))
    assert len(page.encode()) < 3_000_000
    assert "greatest 50" in page


def test_thousands_of_attempts_make_a_small_page(tmp_path: Path) -> None:
    """5000, one after each step, with reasons and faults of 180 characters: the newest are shown, and how many not."""
    num, word = 5000, "y" * 180
    began = [Began(at, f"{at} {word}") for at in range(num)]
    run = make_run(tmp_path, steps=num, total=num, began=began, ended=False)
    lost = [Fault(f"2026-01-0{1 + at // 1440}T{at // 60 % 24:02d}:{at % 60:02d}:30Z", word) for at in range(num)]
    (Path(run) / "faults.jsonl").write_text("".join(json.dumps(asdict(each)) + "\n" for each in lost))
    facts = read_facts(run)
    html = run_page(facts)
    assert len(html.encode()) < 3_000_000
    page = Page(html)
    assert f"{SHOWN_MARKS} of 4,999 are drawn, evenly chosen" in page.text
    assert html.count('class="mark"') == SHOWN_MARKS * (html.count('class="chart"') - 1)
    assert "attempt 4999 began after step 4,999: 4999 yyy" in html  # The newest has its mark.
    assert "The newest 500 of 5,000, on the time axis too; the 4,500 older ones are in attempts.jsonl" in page.text
    assert "The newest 500 of 5,000; the 4,500 older ones are in faults.jsonl" in page.text
    # Whole in the table alone.
    assert html.count(f"4999 {word}") == html.count(f"4500 {word}") == 1
    assert f"4499 {word}" not in html
    bars = html.partition('<div class="timeline"')[2].partition('<div class="axis">')[0]
    assert bars.count('class="row"') == SHOWN_NEWEST
    assert bars.count("<i ") == SHOWN_NEWEST
    # None of what fell before the axis begins.
    assert '<i style="left: 0.0%' not in bars


def test_many_runs_make_a_small_page(tmp_path: Path) -> None:
    """48 of 1000 steps each with long names, all with evaluations; of two as much is drawn as of each by itself."""
    facts = read_facts(make_run(tmp_path, steps=1000, total=1000))
    runs = [
        replace(facts, name=f"my-run-beta-0.{at}-learning_rate-1e-{at}", config={**facts.config, "seed": at})
        for at in range(48)
    ]
    html = comparison_page(runs)
    assert len(html.encode()) < 3_000_000
    text = Page(html).text
    assert all(each.name in text for each in runs)
    curve = re.compile(r'<path class="curve s0 thin" d="([^"]*)"')
    assert curve.findall(comparison_page(runs[:2]))[0] == curve.findall(run_page(facts))[0]


def test_comparison(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "a"), make_run(tmp_path, "b", chosen_falls=False, objective={"beta": 0.2})]
    write_comparison(runs, str(tmp_path / "both.html"))
    text = Page((tmp_path / "both.html").read_text()).text
    assert "2 runs compared" in text
    assert "a: the chosen answers have become less likely" in text
    assert "b: the chosen answers have become less likely" not in text
    assert "objective.beta 0.1 0.2" in text
    assert "train.max_steps" not in text
    with pytest.raises(ConfigError, match="give two runs or more"):
        write_comparison(runs[:1], str(tmp_path / "one.html"))


def evaluated(run: str, step: int, kl: float, margin: float) -> None:
    """A summary as `dpo-ray evaluate` leaves it, as far as a page reads it."""

    def estimate(value: float) -> dict[str, float | int | None]:
        return {"value": value, "low": value / 2, "high": None, "num": 9}

    metrics = {"rewards/accuracies": estimate(0.5), "rewards/margins": estimate(margin)}
    found = {"step": step, "held_out": {"metrics": metrics}, "answers": {"kl": {"k3": estimate(kl)}}}
    storage.write_json(storage.join(run, "evaluation", "summary.json"), found)


def test_what_kl_buys(tmp_path: Path) -> None:
    """Margins over beta of 0.1 and 0.2: 20 and 15 nats. What was found of another step's model says nothing."""
    runs = [make_run(tmp_path, "a"), make_run(tmp_path, "b", objective={"beta": 0.2}), make_run(tmp_path, "c")]
    for run, step, kl, margin in zip(runs, (40, 40, 30), (4.0, 5.0, 6.0), (2.0, 3.0, 4.0), strict=True):
        evaluated(run, step, kl, margin)
    facts = [read_facts(run) for run in runs]
    assert [each.evaluated and each.evaluated.margin.value for each in facts] == [20.0, pytest.approx(15.0), None]
    page = Page(comparison_page(facts))
    assert "What KL buys" in page.text
    assert "KL to the reference" in page.text
    assert "4 (2 to 4) 20 (10 to 20) yes" in page.text
    assert "5 (2.5 to 5) 15 (7.5 to 15) " in page.text
    assert "What KL buys" not in comparison_page(facts[1:])


def test_durations() -> None:
    assert [duration(each) for each in (0.04, 59.4, 61.0, 3599.0, 7300.0)] == [
        "0.0 s",
        "59 s",
        "1 min 1 s",
        "59 min 59 s",
        "2 h 1 min",
    ]


def test_an_evaluation_and_answers_side_by_side(tmp_path: Path) -> None:
    """14 answers against the reference's, all better: Wilson's lower end is 14 / (14 + 1.96^2)."""
    run = make_run(tmp_path)
    before = Page(run_page(read_facts(run)))
    assert not {"evaluation", "answers"} & set(before.ids)
    add_evaluation(run)
    html = run_page(read_facts(run))
    page = Page(html)
    assert {"evaluation", "answers"} <= set(page.ids)
    assert (
        f"win rate against reference (14 won, 0 tied, 0 lost) 100.0 % {100 * 14 / (14 + 1.959964**2):.1f} %"
        in page.text
    )
    assert f"win rate against models/other 100.0 % ({100 * 14 / (14 + 1.959964**2):.1f} to 100.0)" in page.text
    # Twelve prompts of fourteen are shown, of each answer what the other one does not have.
    assert page.tags.count("mark") == 12 * 3
    assert "<mark>cat</mark> sat <mark>&lt;b&gt;here&lt;/b&gt;</mark>." in html
    assert "The <mark>dog</mark> sat." in html
    assert "zzz … (1,000 characters more)" in page.text
    assert "policy against reference: the first one's is better; policy against models/other: no verdict." in page.text
    assert "chosen answers are &lt;less&gt; likely" in html
    assert "KL to the reference, nats an answer (k1) 0.65" in page.text


def test_an_evaluation_of_fewer_steps_is_no_figure(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=50, total=50)
    add_evaluation(run)
    page = Page(run_page(read_facts(run)))
    assert "win rate against reference 100.0 % (" not in page.text
    assert "The run has gone on since, to step 50: evaluate it again." in page.text


def test_marks_are_words_in_their_order() -> None:
    assert marked("a b c", "a b c") == [("a b c", False)]
    assert marked("a b c", "") == [("a b c", True)]
    assert marked("one two three four", "one four") == [("one ", False), ("two three", True), (" four", False)]
    assert marked("", "x") == []
    # The word that both have, not the spaces that they have too.
    assert marked("w x y z", "p q r w") == [("w ", False), ("x y z", True)]


def test_marks_of_an_answer_that_repeats_itself() -> None:
    """By longest blocks, as `difflib` has them, each of these took seconds or minutes."""
    began = time.process_time()
    assert marked("!" * 3000, "!" * 3000) == [("!" * 3000, False)]
    assert marked("!" * 3000, "! " * 1000) == [("!" * 1000, False), ("!" * 2000, True)]
    assert marked("!?" * 1500, "!" * 3000)[:3] == [("!", False), ("?", True), ("!", False)]
    assert time.process_time() - began < 1.0


def test_a_prompt_of_many_turns_is_clipped_as_a_whole(tmp_path: Path) -> None:
    """From its end, which is what is answered: two turns of a thousand characters, and the last words of none."""
    run = make_run(tmp_path)
    add_evaluation(run)
    place = storage.join(run, "evaluation", "side_by_side.jsonl")
    line, *_ = storage.read_json_lines(place)
    turns = [{"role": "user", "content": f"turn {at} " + "z" * SHOWN_CHARS} for at in range(500)]
    last = {"role": "user", "content": "the question"}
    storage.write_json_lines(place, [{**line, "prompt": [*turns, last]}])
    html = run_page(read_facts(run))
    (shown,) = re.findall('<div class="prompt">(.*?)</div>', html)
    assert len(shown) < SHOWN_CHARS + 300
    text = Page(shown).text
    assert text.startswith("… (499 earlier turns) user: turn 499 zzz")
    assert re.search(r"zzz … \(\d+ characters more\) user: the question$", text)


def test_a_page_of_pairs(tmp_path: Path) -> None:
    make_run(tmp_path)
    (uri,) = (tmp_path / "store" / "pairs").iterdir()
    pairs = open_store(str(uri))
    assert pairs is not None
    found = describe(pairs)
    write_data_page(found, str(tmp_path / "data.html"))
    page = Page((tmp_path / "data.html").read_text())
    assert "script" not in page.tags
    assert page.tags.count("svg") == 4  # The chart and its legend.
    assert "rows 33" in page.text
    # The longest bar of prompts, as the chart says it in words: their share of the fullest bin.
    histogram = found.lengths["prompt"].histogram
    longest = max(len(each.histogram) for each in found.lengths.values())
    width = -(-longest // LENGTH_BINS)
    fullest = max(sum(histogram[start : start + width]) for start in range(0, longest, width))
    assert re.search(f"prompt: from .*?, greatest {number(100 * fullest / 32)}", (tmp_path / "data.html").read_text())
