"""Which checkpoints there are, through retention, damage and power cuts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_ray import storage
from dpo_ray.errors import CheckpointError, FencedError, VersionError
from dpo_ray.training import manifest
from dpo_ray.training.manifest import FileRecord, Manifest
from dpo_ray.types import TrainState


def write(run: Path, step: int, attempt: int, committed: bool = True) -> None:
    """A checkpoint of one file, as a save leaves it; or, not committed, as a death leaves it."""
    name = manifest.checkpoint_name(step)
    file = f"{manifest.attempt_folder(attempt)}/rank-0000.safetensors"
    storage.write_bytes(storage.join(manifest.checkpoint_uri(str(run), name), file), b"x")
    if committed:
        about = Manifest(TrainState(step, 0), attempt, 1, {file: FileRecord(1, "0")})
        manifest.commit(str(run), about, lambda: None)


def steps(run: Path) -> list[int]:
    return [int(name.removeprefix("step-")) for name in manifest.committed(str(run))]


def newest(run: Path) -> int | None:
    found = manifest.newest(str(run))
    return None if found is None else found[1].state.step


def folders(run: Path) -> set[str]:
    """Which attempts have files of which steps, such as 3/0007."""
    found = run.glob("checkpoints/*/attempt-*/*")
    return {f"{int(path.parts[-3][5:])}/{path.parts[-2][8:]}" for path in found}


def test_only_what_has_a_manifest_is_a_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    write(tmp_path, 1, 0)
    write(tmp_path, 2, 0)
    write(tmp_path, 3, 0, committed=False)
    assert steps(tmp_path) == [1, 2]
    about = manifest.read_manifest(str(tmp_path), "step-00000002")
    files = {"attempt-0000/rank-0000.safetensors": FileRecord(1, "0")}
    assert about == Manifest(TrainState(2, 0), 0, 1, files)
    assert newest(tmp_path) == 2


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'{"format": 2, "sta',
        b"\x80\x04\x95pickle",
        b"[]",
        b"{}",
        b'{"format": "x", "state": {"step": 2}, "attempt": 0, "world_size": 1, "files": {}}',
        b'{"format": 2, "state": {"step": 1}, "attempt": 0, "world_size": 1, "files": {}}',
        b'{"format": 2, "state": {"step": 2, "x": 0}, "attempt": 0, "world_size": 1, "files": {}}',
        b'{"format": 2, "state": {"step": 2}, "attempt": 0, "world_size": 1, "files": {"a": 3}}',
        b'{"format": 2, "state": {"step": 2}, "attempt": "x", "world_size": 1, "files": {}}',
    ],
)
def test_a_manifest_that_cannot_be_read_is_set_aside(tmp_path: Path, text: bytes) -> None:
    """Its content stays to be looked at, and its step can be written anew."""
    write(tmp_path, 1, 0)
    write(tmp_path, 2, 0)
    folder = tmp_path / "checkpoints" / "step-00000002"
    (folder / "manifest.json").write_bytes(text)
    assert newest(tmp_path) == 1
    record = json.loads((folder / "set-aside-unreadable.json").read_text())
    assert str(folder / "manifest.json") in record["reason"]
    assert record["manifest"] == text.decode(errors="replace")
    assert steps(tmp_path) == [1]
    manifest.collect_orphans(str(tmp_path), 1)
    assert folders(tmp_path) == {"1/0000", "2/0000"}
    write(tmp_path, 2, 1)
    assert newest(tmp_path) == 2


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    """And left as it is: that version can go on with it."""
    write(tmp_path, 1, 0)
    place = tmp_path / "checkpoints" / "step-00000001" / "manifest.json"
    raw = json.loads(place.read_text())
    place.write_text(json.dumps({**raw, "format": 1}))
    with pytest.raises(
        VersionError, match=r"step-00000001/manifest.json: a checkpoint of format 1, .* reads 2, 3, 4: go on"
    ):
        newest(tmp_path)
    assert json.loads(place.read_text())["format"] == 1


def test_the_newest_attempt_owns_a_step(tmp_path: Path) -> None:
    """Also when an older attempt, which does not know that it is over, comes last, or was set aside."""
    write(tmp_path, 1, 4)
    write(tmp_path, 2, 4)
    manifest.set_aside(str(tmp_path), "step-00000002", "damaged")
    assert newest(tmp_path) == 1
    write(tmp_path, 2, 5)
    assert manifest.read_manifest(str(tmp_path), "step-00000002").attempt == 5
    assert steps(tmp_path) == [1, 2]
    with pytest.raises(FencedError, match="attempt 5 has committed it"):
        write(tmp_path, 2, 3)
    write(tmp_path, 2, 6)
    assert manifest.read_manifest(str(tmp_path), "step-00000002").attempt == 6


def test_nothing_is_committed_when_the_fence_raises(tmp_path: Path) -> None:
    def fence() -> None:
        raise FencedError("over")

    with pytest.raises(FencedError, match="over"):
        manifest.commit(str(tmp_path), Manifest(TrainState(1, 0), 0, 1, {}), fence)
    assert steps(tmp_path) == []


def test_prune_spares_what_a_newer_attempt_loads(tmp_path: Path) -> None:
    for step in range(1, 5):
        write(tmp_path, step, 0)
    manifest.prune(str(tmp_path), keep=1, attempt=0, spared={manifest.checkpoint_name(2), None})
    assert steps(tmp_path) == [2, 4]


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    """Of the steps 1 to 6, with 2 set aside, 5 set aside and the best at 1, the newest two are 4 and 6."""
    for step in range(1, 7):
        write(tmp_path, step, 0)
    for step in (2, 5):
        manifest.set_aside(str(tmp_path), manifest.checkpoint_name(step), "damaged")
    write(tmp_path, 3, 9, committed=False)
    manifest.prune(str(tmp_path), keep=2, attempt=0, best_step=1)
    assert steps(tmp_path) == [1, 3, 4, 6]  # Attempt 9 may be writing to step 3's folder.
    assert folders(tmp_path) == {"1/0000", "3/0000", "3/0009", "4/0000", "5/0000", "6/0000"}
    manifest.prune(str(tmp_path), keep=1, attempt=9)
    assert folders(tmp_path) == {"6/0000"}
    manifest.prune(str(tmp_path), keep=1, attempt=9)
    assert steps(tmp_path) == [6]


def test_orphans_are_removed_but_never_a_live_attempts(tmp_path: Path) -> None:
    write(tmp_path, 1, 0)
    write(tmp_path, 2, 1)
    write(tmp_path, 2, 2)  # Attempt 1's files are nobody's now.
    write(tmp_path, 3, 1)
    manifest.set_aside(str(tmp_path), "step-00000003", "damaged")
    write(tmp_path, 3, 2, committed=False)
    write(tmp_path, 4, 2, committed=False)
    write(tmp_path, 4, 3, committed=False)
    write(tmp_path, 5, 4, committed=False)
    removed = manifest.collect_orphans(str(tmp_path), live_attempt=3)
    assert folders(tmp_path) == {"1/0000", "2/0002", "3/0001", "4/0003", "5/0004"}
    assert len(removed) == 3
    assert manifest.collect_orphans(str(tmp_path), live_attempt=3) == []
    assert steps(tmp_path) == [1, 2]


class PowerCut(BaseException):
    """Nothing after this line happens."""


def cut_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """Lets so many writes and removals of files happen, then none."""
    left = writes
    write_bytes, remove = storage.write_bytes, storage.remove

    def spend() -> None:
        nonlocal left
        if left == 0:
            raise PowerCut
        left -= 1

    def cut_write(uri: str, data: bytes) -> None:
        spend()
        write_bytes(uri, data)

    def cut_remove(uri: str) -> None:
        files = [path for path in Path(uri).rglob("*") if path.is_file()] if Path(uri).is_dir() else [Path(uri)]
        for path in sorted(files):  # A folder goes file by file.
            spend()
            path.unlink(missing_ok=True)
        remove(uri)

    monkeypatch.setattr(storage, "write_bytes", cut_write)
    monkeypatch.setattr(storage, "remove", cut_remove)


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        (lambda run: write(run, 2, 1), [1, 2], [1, 2]),
        (lambda run: write(run, 3, 1), [1, 2], [1, 2, 3]),
        (lambda run: manifest.set_aside(str(run), "step-00000002", "damaged"), [1, 2], [1]),
        (lambda run: manifest.prune(str(run), keep=1, attempt=1), [1, 2], [2]),
    ],
    ids=["again", "new", "set aside", "prune"],
)
def test_a_power_cut_leaves_the_old_or_the_new(
    tmp_path: Path, change: Callable[[Path], Any], before: list[int], after: list[int]
) -> None:
    """After any number of writes the checkpoints are those before or those after; and what they name is there."""
    seen = []
    for writes in range(10):
        run = tmp_path / str(writes)
        write(run, 1, 0)
        write(run, 2, 0)
        with pytest.MonkeyPatch.context() as patched:
            cut_after(patched, writes)
            try:
                change(run)
                done = True
            except PowerCut:
                done = False
        seen.append(steps(run))
        assert newest(run) == seen[-1][-1]
        for step in seen[-1]:
            about = manifest.read_manifest(str(run), manifest.checkpoint_name(step))
            assert f"{step}/{about.attempt:04d}" in folders(run)
        # The next attempt clears up what was left behind, and no more.
        manifest.collect_orphans(str(run), 2)
        assert steps(run) == seen[-1]
        if done:
            break
    assert done
    assert seen[0] == before
    assert seen[-1] == after
    assert all(found in (before, after) for found in seen)


def test_files_of_a_removal_cut_short_go(tmp_path: Path) -> None:
    write(tmp_path, 1, 0)
    write(tmp_path, 2, 0)
    (tmp_path / "checkpoints" / "step-00000001" / "manifest.json").unlink()
    manifest.collect_orphans(str(tmp_path), 1)
    assert folders(tmp_path) == {"2/0000"}


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("eval_loss", [0.7, 0.5, 0.6, 0.5, 0.4], [0, 1, 4]),
        ("eval_rewards/accuracies", [0.5, 0.7, 0.7, 0.6], [0, 1]),
        ("eval_rewards/margins", [float("nan"), -1.0, float("nan"), 0.0], [1, 3]),
    ],
)
def test_the_best_is_the_first_of_equals(metric: str, values: list[float], best: list[int]) -> None:
    state, found = TrainState(), []
    for step, value in enumerate(values):
        if manifest.take_best(metric, {"step": step, metric: value}, state):
            found.append(step)
            assert (state.best_metric, state.best_step, state.best_value) == (metric, step, value)
    assert found == best
    # Loss and accuracy cannot be compared.
    margins = TrainState(1, 0, "eval_rewards/margins", 1, 0.3)
    assert manifest.take_best("eval_loss", {"step": 2, "eval_loss": 9.0}, margins)


def test_a_missing_manifest_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        manifest.read_manifest(str(tmp_path), "step-00000001")
    write(tmp_path, 1, 0)
    (tmp_path / "checkpoints" / "step-00000001" / "manifest.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"step-00000001/manifest\.json: damaged"):
        manifest.read_manifest(str(tmp_path), "step-00000001")


def test_a_power_cut_while_setting_aside_loses_nothing(tmp_path: Path) -> None:
    """Between the record and the manifest: the record counts, and the files stay to be looked at."""
    write(tmp_path, 1, 0)
    write(tmp_path, 2, 0)
    with pytest.MonkeyPatch.context() as patched:
        cut_after(patched, 1)
        with pytest.raises(PowerCut):
            manifest.set_aside(str(tmp_path), "step-00000002", "damaged")
    there = {path.name for path in (tmp_path / "checkpoints" / "step-00000002").iterdir()}
    assert there == {"attempt-0000", "manifest.json", "set-aside-0000.json"}
    assert steps(tmp_path) == [1]
    manifest.prune(str(tmp_path), keep=1, attempt=1)
    manifest.collect_orphans(str(tmp_path), 1)
    assert folders(tmp_path) == {"1/0000", "2/0000"}
