"""Proves from a run's directory and its pair store that every pair was trained on exactly once per epoch.

Or, in a mixture, as often as its source's weight says. The plan is made anew from the run's configuration and the ids
in the pair store, and compared with the ledger step by step. That the plan's epochs have every pair so often is counted
here, not taken from the plan's own arithmetic. Nothing is written, and neither Ray nor torch is needed; a run may go on
meanwhile.
"""

from __future__ import annotations

import io
import json
import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import yaml

from dpo_ray import storage
from dpo_ray.errors import CheckpointError, DataError, first_line
from dpo_ray.orchestration.watch import Watcher
from dpo_ray.pairs.plan import Plan, Take, batch_digest, source_weights, total_steps
from dpo_ray.pairs.store import Chunk, PairStore, open_store, read_pair_ids
from dpo_ray.training import manifest

FINDINGS_KEPT = 20
IDS_KEPT_BYTES = 256 * 2**20
PROGRESS_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong.

    Attributes:
        step: The first step that it concerns; None where it concerns none in particular.
        text: What was expected, and what was found.
    """

    step: int | None
    text: str


@dataclass(frozen=True, slots=True)
class AttemptSummary:
    """What an attempt left in the ledger.

    Attributes:
        attempt: Its number.
        position: Global batches done before it.
        world_size: Policy workers.
        reason: Why it was started.
        steps: Its lines in the ledger: steps that no later attempt has done again.
    """

    attempt: int
    position: int
    world_size: int
    reason: str
    steps: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a run's ledger proves.

    Attributes:
        run_uri: The run directory.
        exact: Whether nothing is wrong, as far as the run has come.
        finished: Whether the run is done and its model exported.
        steps: Where the ledger ends.
        total_steps: Where the run ends.
        steps_per_epoch: Global batches of one epoch.
        pairs: Pairs of one epoch.
        weighted: Whether the epoch is a mixture, and so has pairs as often as their sources' weights say.
        pairs_trained: Pairs of all steps in the ledger.
        checkpoint: Step of the newest committed checkpoint, or None.
        redone_steps: Steps that are known to have been done more than once; there may be more.
        attempts: The starts of worker groups.
        num_findings: How many things are wrong.
        findings: The first of them.
    """

    run_uri: str
    exact: bool
    finished: bool
    steps: int
    total_steps: int
    steps_per_epoch: int
    pairs: int
    weighted: bool
    pairs_trained: int
    checkpoint: int | None
    redone_steps: int
    attempts: tuple[AttemptSummary, ...]
    num_findings: int
    findings: tuple[Finding, ...]

    @property
    def line(self) -> str:
        """The verdict in one line."""
        reached = f"{self.steps} of {self.total_steps} steps"
        if not self.exact:
            return f"not exact: {self.num_findings} finding{'s' if self.num_findings > 1 else ''} in {reached}"
        if not self.steps:
            return f"exact so far: {reached}, nothing trained yet"
        epochs, steps = divmod(self.steps, self.steps_per_epoch)
        begun = f"{steps} of {self.steps_per_epoch} steps of epoch {epochs + 1}" if steps else ""
        if begun and not self.weighted:
            begun += ", no pair twice"
        whole = "every pair as often as its source's weight says" if self.weighted else "every pair once per epoch"
        parts = [reached, whole if epochs else "", begun]
        said = ", ".join(part for part in parts if part)
        return f"exact: {said}" if self.finished else f"exact so far: {said}; the run is not finished"


@dataclass(slots=True)
class _Findings:
    """Counts what is wrong and keeps the first of it."""

    num: int = 0
    first: list[Finding] = field(default_factory=list)

    def add(self, step: int | None, text: str) -> None:
        self.num += 1
        if len(self.first) < FINDINGS_KEPT:
            self.first.append(Finding(step, text))


@dataclass(frozen=True, slots=True)
class _Run:
    """A run's files, all of one moment.

    Attributes:
        config: Its configuration, as plain data: one written by another version is read too.
        about: What is stored beside it.
        attempts: attempts.jsonl.
        checkpoints: Of each committed checkpoint the step, and the attempt that wrote it.
        swept: Whether no checkpoint is left at all, as when someone has made room.
        exported: Step of the exported model, or None.
        ledger: ledger.jsonl.
        metric_steps: Steps of the training lines in metrics.jsonl.
    """

    config: dict[str, Any]
    about: dict[str, Any]
    attempts: list[dict[str, Any]]
    checkpoints: dict[int, int]
    swept: bool
    exported: int | None
    ledger: bytes
    metric_steps: list[int]


@dataclass(slots=True)
class _Stretch:
    """Consecutive ledger lines of one attempt."""

    attempt: int
    world_size: int
    first: int
    last: int


def verify(run_uri: str, watcher: Watcher | None = None) -> Verdict:
    """Compares a run's ledger with the plan, the pair store, the attempts, the checkpoints and the metrics.

    Args:
        run_uri: `<storage_path>/<name>`, of a run that is finished, running or interrupted.
        watcher: Told how far it is; None for silence.

    Raises:
        DataError: This is no run, or its pair store is gone or damaged.
        StorageError: It cannot be read.
    """
    run_uri = run_uri if "://" in run_uri else os.path.abspath(os.path.expanduser(run_uri))
    storage.check_reachable(run_uri)
    run, findings = _read_run(run_uri), _Findings()
    pairs = _open_pairs(run_uri, run.about["pairs"])
    attempts = _attempts(run, findings)

    batch, weights = run.config["train"]["global_batch_pairs"], source_weights(run.config["data"]["train"])
    plan = Plan(run.config["seed"], pairs.train, batch, 0, weights)
    per_epoch = plan.steps_per_epoch
    if per_epoch != run.about["steps_per_epoch"]:
        found = f"{plan.num_pairs} pairs of {pairs.uri} in batches of {batch} make {per_epoch} steps per epoch"
        findings.add(None, f"{found}, config.yaml says {run.about['steps_per_epoch']}")
    planned = total_steps(per_epoch, run.config["train"]["epochs"], run.config["train"]["max_steps"])
    # A run whose end was brought forward keeps the steps that it had done.
    total = max(planned, attempts[-1]["position"] if attempts else 0)
    newest = max(run.checkpoints, default=None)
    finished = run.exported is not None and run.exported >= planned and (run.swept or newest == run.exported)

    walk = _Walk(replace(plan, total_steps=total), pairs, findings)
    walk.ledger(run.ledger, watcher or Watcher())
    _check_attempts(walk.stretches, attempts, run, finished, findings)
    _check_ends(walk.steps, run, attempts, total if finished else None, findings)
    return Verdict(
        run_uri=run_uri,
        exact=not findings.num,
        finished=finished,
        steps=walk.steps,
        total_steps=total,
        steps_per_epoch=per_epoch,
        pairs=plan.num_pairs,
        weighted=bool(weights),
        pairs_trained=walk.pairs_trained,
        checkpoint=newest,
        redone_steps=_known_redone(attempts),
        attempts=tuple(_summary(attempt, walk.stretches) for attempt in attempts),
        num_findings=findings.num,
        findings=tuple(findings.first),
    )


def _read_run(run_uri: str) -> _Run:
    """Reads all files of a run as they are together, also while it goes on.

    A checkpoint promises ledger and metrics up to its step, so it is read before them; and when an attempt has begun
    meanwhile, which may drop lines, all is read again.

    Raises:
        DataError: This is no run.
    """
    place = storage.join(run_uri, "config.yaml")
    try:
        described = yaml.safe_load(storage.read_bytes(place))
        config, about = described["config"], described["about"]
        numbers = [config["seed"], config["train"]["epochs"], config["train"]["global_batch_pairs"]]
        if not all(isinstance(number, int) for number in [*numbers, about["steps_per_epoch"]]) or not all(numbers[1:]):
            raise TypeError("seed, epochs, global_batch_pairs or steps_per_epoch is no number to go by")
        _ = config["train"]["max_steps"], config["data"]["train"], about["pairs"]
    except FileNotFoundError:
        raise DataError(
            f"{run_uri}: not the directory of a run: it has no config.yaml; give <storage_path>/<name>"
        ) from None
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(f"{place}: not what a run writes there, or damaged: {first_line(error)}") from None
    attempts_uri = storage.join(run_uri, "attempts.jsonl")
    attempts = _read(attempts_uri)
    while True:
        exported = _read(storage.join(run_uri, "export", "exported.json"))
        checkpoints = _checkpoints(run_uri)
        swept = not checkpoints and not storage.list_names(storage.join(run_uri, "checkpoints"))
        ledger = _read(storage.join(run_uri, "ledger.jsonl"))
        metrics = _read(storage.join(run_uri, "metrics.jsonl"))
        before, attempts = attempts, _read(attempts_uri)
        if before == attempts:
            break
    return _Run(
        config,
        about,
        [line or {} for line in _json_lines(attempts)],
        checkpoints,
        swept,
        (_json_object(exported) or {}).get("step"),
        ledger,
        [line.get("step", -1) if line else -1 for line in _json_lines(metrics) if line is None or "loss" in line],
    )


def _read(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        return b""


def _json_lines(data: bytes) -> Iterator[dict[str, Any] | None]:
    """The objects of a JSON Lines file, None for a line that holds none."""
    for line in io.BytesIO(data):
        if line.strip():
            yield _json_object(line)


def _json_object(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _checkpoints(run_uri: str) -> dict[int, int]:
    """Step and attempt of the committed checkpoints; nothing is set aside."""
    found = {}
    for name in manifest.committed(run_uri):
        try:
            about = manifest.read_manifest(run_uri, name)
        except (CheckpointError, FileNotFoundError):  # No checkpoint to go on from, or just removed.
            continue
        found[about.state.step] = about.attempt
    return found


def _open_pairs(run_uri: str, stored_uri: str) -> PairStore:
    """The pair store of a run; beside it where runs and stores have been moved together.

    Raises:
        DataError: It is gone or damaged.
    """
    beside = storage.join(run_uri.rstrip("/").rpartition("/")[0], "store", "pairs", storage.name_of(stored_uri))
    for place in dict.fromkeys((stored_uri, beside)):
        try:
            pairs = open_store(place)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{storage.join(place, 'manifest.json')}: damaged: {error!r}") from None
        if pairs is not None and pairs.train:
            return pairs
    raise DataError(f"{stored_uri}: the run's pair store is gone: without it nothing can be compared with the ledger")


def _attempts(run: _Run, findings: _Findings) -> list[dict[str, Any]]:
    """The attempts that can be read, in the order of their starts."""
    found: list[dict[str, Any]] = []
    for number, line in enumerate(run.attempts, 1):
        if not all(isinstance(line.get(name), int) for name in ("attempt", "position", "world_size")):
            findings.add(None, f"attempts.jsonl, line {number}: not an attempt's")
        elif found and line["attempt"] <= found[-1]["attempt"]:
            findings.add(None, f"attempts.jsonl: attempt {line['attempt']} stands after {found[-1]['attempt']}")
        else:
            found.append(line)
    return found


class _Walk:
    """Goes through ledger and plan together, one step at a time."""

    def __init__(self, plan: Plan, pairs: PairStore, findings: _Findings) -> None:
        self._plan, self._pairs, self._findings = plan, pairs, findings
        self._kept: dict[str, bytes] = {}
        self._room = IDS_KEPT_BYTES
        self._ranges: dict[str, tuple[bytes, bytes]] = {}
        self._per_epoch = plan.steps_per_epoch
        self.steps = self.pairs_trained = 0
        self.stretches: list[_Stretch] = []

    def ledger(self, data: bytes, watcher: Watcher) -> None:
        """Compares each line with the plan, and counts the pairs of each epoch."""
        planned, epoch_ids, listed = self._batches(), bytearray(), 0
        total, told = data.count(b"\n"), time.monotonic()
        shown = False
        for number, line in enumerate(_json_lines(data), 1):
            if not self._in_order(number, line):
                continue
            assert line is not None
            expected = next(pair_ids for step, pair_ids in planned if step == line["step"])
            self.steps = line["step"]
            self.pairs_trained += line["num_pairs"]
            self._compare(line, expected)
            self._stretch(line)
            if own := _own_ids(line):
                epoch_ids += own
                listed += 1
            if self.steps % self._per_epoch == 0:
                if listed == self._per_epoch and not self._plan.weights:
                    self._count(self.steps // self._per_epoch, bytes(epoch_ids))
                epoch_ids, listed = bytearray(), 0
            if time.monotonic() - told > PROGRESS_EVERY_S:
                watcher.progress("steps", number, total)
                told, shown = time.monotonic(), True
        if shown:
            watcher.progress("steps", total, total)
        self._check_store()

    def _in_order(self, number: int, line: dict[str, Any] | None) -> bool:
        """Whether a line is one, and comes after the line before it."""
        kinds = {"step": int, "digest": str, "num_pairs": int, "attempt": int, "world_size": int}
        if line is None or not all(isinstance(line.get(name), kind) for name, kind in kinds.items()):
            self._findings.add(None, f"ledger.jsonl, line {number}: not a step's")
            return False
        step, expected = line["step"], self.steps + 1
        if step > self._plan.total_steps:
            self._findings.add(step, f"beyond the end of the run at step {self._plan.total_steps}")
        elif step < expected:
            self._findings.add(step, f"a duplicate or out of order: it stands after step {self.steps}")
        elif step > expected:
            missing = f"steps {expected} to {step - 1} are" if step > expected + 1 else f"step {expected} is"
            self._findings.add(expected, f"{missing} missing: after step {self.steps} comes step {step}")
        return expected <= step <= self._plan.total_steps

    def _compare(self, line: dict[str, Any], expected: Sequence[bytes]) -> None:
        """One step's line with the plan's batch."""
        step, digest = line["step"], batch_digest(expected)
        if line["num_pairs"] != len(expected):
            self._findings.add(step, f"num_pairs is {line['num_pairs']}, expected {len(expected)}")
        if line["digest"] != digest:
            self._findings.add(step, f"digest is {line['digest']}, expected {digest}")
        if "pair_ids" in line and line["pair_ids"] != (ids := [pair_id.hex() for pair_id in expected]):
            found = line["pair_ids"] if isinstance(line["pair_ids"], list) else []
            place = next((i for i, (a, b) in enumerate(zip(found, ids, strict=False)) if a != b), None)
            if place is None:
                self._findings.add(step, f"pair_ids has {len(found)} ids, expected {len(ids)}")
            else:
                self._findings.add(step, f"pair {place + 1} of the step is {found[place]}, expected {ids[place]}")

    def _stretch(self, line: dict[str, Any]) -> None:
        last = self.stretches[-1] if self.stretches else None
        step, by = line["step"], (line["attempt"], line["world_size"])
        if last is not None and (last.attempt, last.world_size) == by and last.last == step - 1:
            last.last = step
        else:
            self.stretches.append(_Stretch(*by, step, step))

    def _batches(self) -> Iterator[tuple[int, list[bytes]]]:
        """Step and ordered ids of each global batch of the plan.

        How often the epochs take each pair of every chunk is counted on the way.
        """
        size, uses = self._plan.global_batch_pairs, {c.name: np.zeros(c.num_pairs, np.int32) for c in self._plan.chunks}
        ordered: tuple[tuple[int, Take] | None, list[int], list[bytes]] = None, [], []
        for window in self._plan.windows(0):
            waiting: list[bytes] = []
            for segment in window.segments:
                key = (window.epoch, segment.take)
                if ordered[0] != key:
                    pair_ids = self._ids(segment.chunk)
                    ordered = key, self._plan.pair_order(segment.take, window.epoch, pair_ids), pair_ids
                taken = ordered[1][segment.start : segment.stop]
                np.add.at(uses[segment.chunk.name], taken, 1)
                waiting += [ordered[2][index] for index in taken]
            batches = [waiting[start : start + size] for start in range(0, len(waiting), size)]
            if (window.first_step + len(batches) - 1) % self._per_epoch == 0:
                self._check_uses(window.epoch + 1, uses)
            yield from enumerate(batches, window.first_step)

    def _check_uses(self, epochs: int, uses: dict[str, np.ndarray]) -> None:
        """Whether the plan has taken each pair once in each epoch, or as often as its source's weight says."""
        for source, weight in enumerate(self._plan.weights or (1.0,)):
            chunks = [chunk for chunk in self._plan.chunks if chunk.source == source]
            num_pairs = sum(chunk.num_pairs for chunk in chunks)
            taken = epochs * max(1, round(weight * num_pairs))
            least, most = taken // num_pairs, -(-taken // num_pairs)
            for chunk in chunks:
                for place in np.flatnonzero((uses[chunk.name] < least) | (uses[chunk.name] > most)):
                    found = f"pair {place} of {chunk.name} {uses[chunk.name][place]} times"
                    said = f"{least} or {most}" if most > least else f"{least}"
                    self._findings.add(None, f"after epoch {epochs} the plan has taken {found}, not {said}")

    def _ids(self, chunk: Chunk) -> list[bytes]:
        """Ids of a chunk, in store order; the first chunks are kept, the others read again in the next epoch."""
        if (kept := self._kept.get(chunk.name)) is not None:
            return [kept[start : start + 16] for start in range(0, len(kept), 16)]
        pair_ids = read_pair_ids(self._pairs.uri, chunk)
        if pair_ids:
            self._ranges[chunk.name] = min(pair_ids), max(pair_ids)
        if 16 * len(pair_ids) <= self._room:
            self._kept[chunk.name] = b"".join(pair_ids)
            self._room -= 16 * len(pair_ids)
        return pair_ids

    def _count(self, epoch: int, own: bytes) -> None:
        """Whether the ids that the ledger has for a complete epoch are the store's, each once."""
        found, times = np.unique(np.frombuffer(own, "S16"), return_counts=True)
        for place in np.flatnonzero(times > 1):
            pair_id = bytes(found[place]).ljust(16, b"\0").hex()
            self._findings.add(None, f"epoch {epoch}: pair {pair_id} is in the ledger {times[place]} times")
        known = 0
        for chunk in self._pairs.train:
            pair_ids = self._ids(chunk)
            there = np.isin(np.frombuffer(b"".join(pair_ids), "S16"), found)
            known += int(there.sum())
            for place in np.flatnonzero(~there):
                text = f"epoch {epoch}: pair {pair_ids[place].hex()} of {chunk.name} is not in the ledger"
                self._findings.add(None, text)
        if known < len(found):
            self._findings.add(None, f"epoch {epoch}: {len(found) - known} pairs of the ledger are not in the store")

    def _check_store(self) -> None:
        """No id twice in the chunks that were read. Those of `prepare` have ranges of their own."""
        group: list[str] = []
        highest = b""
        chunks = {chunk.name: chunk for chunk in self._pairs.train}
        for name in sorted(self._ranges, key=self._ranges.__getitem__):
            low, high = self._ranges[name]
            if group and low > highest:
                self._check_group([chunks[each] for each in group])
                group = []
            group.append(name)
            highest = max(highest, high)
        self._check_group([chunks[each] for each in group])

    def _check_group(self, group: Sequence[Chunk]) -> None:
        ids = np.concatenate([np.zeros(0, "S16"), *(np.frombuffer(b"".join(self._ids(c)), "S16") for c in group)])
        ids.sort()
        for pair_id in np.unique(ids[1:][ids[1:] == ids[:-1]]):
            shown = bytes(pair_id).ljust(16, b"\0").hex()
            self._findings.add(None, f"pair {shown} is in the pair store more than once")


def _own_ids(line: dict[str, Any]) -> bytes:
    """The ids that a line lists; empty where it lists none that can be read."""
    try:
        return bytes.fromhex("".join(line.get("pair_ids") or ()))
    except (ValueError, TypeError):
        return b""


def _check_attempts(
    stretches: Sequence[_Stretch], attempts: Sequence[dict[str, Any]], run: _Run, finished: bool, findings: _Findings
) -> None:
    """Each line of the ledger is of the attempt that the positions say.

    An attempt drops the lines after its position, then adds its own. So of those that have come so far, the last one
    whose position is below a step is the one whose line stands there; attempts without a line of their own, because
    they did no step or because all of theirs were done again, need no rule. Only an attempt that has not come so far
    has dropped nothing yet; then it has done no step, and nobody has begun after it at a later position than its own.
    """
    place = {attempt["attempt"]: index for index, attempt in enumerate(attempts)}
    numbers = [stretch.attempt for stretch in stretches] + list(run.checkpoints.values())
    positions = [attempt["position"] for attempt in attempts]
    came = [place[number] for number in numbers if number in place]
    came += [index for index, position in enumerate(positions[:-1]) if min(positions[index + 1 :]) > position]
    if finished:
        came.append(len(attempts) - 1)
    owners: list[int] = []
    for index in range(max(came, default=-1) + 1):
        while owners and positions[owners[-1]] >= positions[index]:
            owners.pop()
        owners.append(index)
    starts = [positions[index] for index in owners]

    for stretch in stretches:
        if stretch.attempt not in place:
            text = f"{_steps(stretch.first, stretch.last)} of attempt {stretch.attempt}, which is not in attempts.jsonl"
            findings.add(stretch.first, text)
            continue
        world_size = attempts[place[stretch.attempt]]["world_size"]
        if stretch.world_size != world_size:
            text = f"world_size is {stretch.world_size}, in attempts.jsonl it is {world_size}"
            findings.add(stretch.first, f"{_steps(stretch.first, stretch.last)} of attempt {stretch.attempt}: {text}")
        step = stretch.first
        while step <= stretch.last:
            owner = bisect_left(starts, step) - 1
            last = min(stretch.last, starts[owner + 1]) if owner + 1 < len(starts) else stretch.last
            expected = attempts[owners[owner]]["attempt"] if owner >= 0 else None
            if stretch.attempt != expected:
                whose = "no attempt has begun before it"
                if expected is not None:
                    whose = f"expected attempt {expected}, which began after step {starts[owner]}"
                findings.add(step, f"{_steps(step, last)} of attempt {stretch.attempt}, {whose}")
            step = last + 1
    for step, attempt in run.checkpoints.items():
        owner = bisect_left(starts, step) - 1
        if owner < 0 or attempts[owners[owner]]["attempt"] != attempt:
            findings.add(step, f"its checkpoint is of attempt {attempt}, which has not done this step last")


def _steps(first: int, last: int) -> str:
    return f"steps {first} to {last} are" if last > first else "is"


def _check_ends(
    steps: int, run: _Run, attempts: Sequence[dict[str, Any]], end: int | None, findings: _Findings
) -> None:
    """Ledger and metrics reach as far as the rest of the run says.

    Args:
        steps: Where the ledger ends.
        run: The run.
        attempts: Its attempts.
        end: The last step of a finished run, or None.
        findings: What is wrong.
    """
    position = attempts[-1]["position"] if attempts else 0
    newest = max(run.checkpoints, default=0)
    if steps < newest:
        findings.add(newest, f"has a checkpoint, but the ledger ends at step {steps}")
    elif steps < position:
        findings.add(position, f"attempt {attempts[-1]['attempt']} began after it, but the ledger ends at step {steps}")
    if end is not None and steps < end:
        findings.add(end, f"is the last of this finished run, but the ledger ends at step {steps}")
    reached = _check_metric_steps(run.metric_steps, findings)
    # The two are written one after the other: past the checkpoint, a death between leaves one behind.
    if reached != steps and (end is not None or reached < max(newest, position)):
        findings.add(min(reached, steps) + 1, f"the ledger ends at step {steps}, metrics.jsonl at step {reached}")


def _check_metric_steps(found: Iterable[int], findings: _Findings) -> int:
    """Whether the training lines of metrics.jsonl are 1, 2, 3, ...; returns the last."""
    reached = 0
    for step in found:
        if not isinstance(step, int) or step < 1:
            findings.add(None, f"metrics.jsonl: after step {reached} stands a line that is not a step's")
        elif step <= reached:
            findings.add(step, f"is in metrics.jsonl twice or out of order: it stands after step {reached}")
        else:
            if step > reached + 1:
                findings.add(reached + 1, f"has no line in metrics.jsonl: after step {reached} comes step {step}")
            reached = step
    return reached


def _known_redone(attempts: Sequence[dict[str, Any]]) -> int:
    """Steps that were behind an attempt and before the next."""
    positions = [attempt["position"] for attempt in attempts]
    return sum(max(0, before - after) for before, after in zip(positions, positions[1:], strict=False))


def _summary(attempt: dict[str, Any], stretches: Iterable[_Stretch]) -> AttemptSummary:
    own = sum(each.last - each.first + 1 for each in stretches if each.attempt == attempt["attempt"])
    reason = str(attempt.get("reason", ""))
    return AttemptSummary(attempt["attempt"], attempt["position"], attempt["world_size"], reason, own)
