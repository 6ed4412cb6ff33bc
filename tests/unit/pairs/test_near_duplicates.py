"""Near-duplicates: those that were planted, and no others."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import chunk_table

from dpo_ray.errors import ConfigError
from dpo_ray.pairs import store
from dpo_ray.pairs.near_duplicates import near_duplicates
from dpo_ray.pairs.tokenize import pair_id
from dpo_ray.types import TokenizedPair

# A system prompt so long that 996 of the 1,196 different shingles of any two pairs are in both: 83 %.
SYSTEM = np.arange(1000, dtype=np.int32)


def made(prompt: np.ndarray, *answers: np.ndarray) -> TokenizedPair:
    prompt = np.concatenate([SYSTEM, prompt])
    return TokenizedPair(pair_id(prompt, answers), prompt, answers)


def random_pair(rng: np.random.Generator) -> TokenizedPair:
    return made(*(rng.integers(1000, 50_000, size, np.int32) for size in (20, 80, 80)))


def copied(pair: TokenizedPair, changed: int) -> TokenizedPair:
    """The pair with other tokens at the end of its chosen answer, and with another rejected one."""
    chosen = pair.answers[0].copy()
    chosen[len(chosen) - changed :] += 1
    return made(pair.prompt[len(SYSTEM) :], chosen, pair.answers[1] + 1)


def make_store(folder: Path, *splits: list[TokenizedPair]) -> store.PairStore:
    """A store with two chunks to train on, and one that is held out."""
    parts = [("train", 0, splits[0][::2]), ("train", 1, splits[0][1::2]), ("eval", 0, splits[1])]
    chunks = [
        store.write_chunk(str(folder), store.chunk_name(split, number), chunk_table(pairs, f"{split}{number}.jsonl"))
        for split, number, pairs in parts
    ]
    return store.PairStore(str(folder), tuple(chunks[:2]), tuple(chunks[2:]), dict.fromkeys(store.COUNTS, 0))


def test_near_duplicates_are_those_that_were_planted(tmp_path: Path) -> None:
    """Of its 100 shingles a copy with n tokens changed at the end shares 100 - n: Jaccard (100 - n) / (100 + n).

    Copies with 1 and with 5 changed differ in the 8 shingles of the 4 tokens between: 92 / 108.
    """
    rng = np.random.default_rng(0)
    base = [random_pair(rng) for _ in range(40)]
    near = [copied(pair, 5) for pair in base[:7]] + [copied(base[7], 0), copied(copied(base[7], 0), 0)]
    far = [copied(pair, 45) for pair in base[10:20]]
    # The first is like two training pairs.
    held_out = [copied(base[6], 1), *(copied(pair, 5) for pair in base[31:33]), *(copied(p, 45) for p in base[33:36])]
    pairs = make_store(tmp_path, [*base, *near, *far], [*held_out, random_pair(rng)])
    seen = list[tuple[int, int]]()
    found = near_duplicates(pairs, lambda *each: seen.append(each))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert found.train == 8 + 9
    assert found.eval == 3
    assert found == near_duplicates(pairs)

    place = {
        place: pair
        for chunk in (*pairs.train, *pairs.eval)
        for pair, place in store.sources_of(pairs.uri, chunk).items()
    }
    expected = zip(held_out[:3], [base[6], *base[31:33]], [99 / 101, 95 / 105, 95 / 105], strict=True)
    planted = {copy.pair_id: (original.pair_id, jaccard) for copy, original, jaccard in expected}
    for match in found.eval_examples:
        assert match.place.startswith("eval0.jsonl row ")
        original, jaccard = planted.pop(place[match.place])
        assert place[match.other] == original
        assert match.similarity == pytest.approx(jaccard, abs=0.07)
    assert not planted


def test_short_pairs(tmp_path: Path) -> None:
    """Shorter than a shingle: alike only where they are the same."""
    tokens = [np.array([number], np.int32) for number in range(30)]
    pairs = [TokenizedPair(pair_id(t, (t, t + 1)), t, (t, t + 1)) for t in tokens]
    again = TokenizedPair(pair_id(tokens[3], (tokens[3], tokens[9])), tokens[3], (tokens[3], tokens[9]))
    found = near_duplicates(make_store(tmp_path, [*pairs, again], pairs[5:6]))
    assert (found.train, found.eval) == (2, 1)


def test_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(
        ConfigError, match=r"--near-duplicates: .*datasketch.*: pip install 'dpo_ray\[data\]', or leave"
    ):
        near_duplicates(store.PairStore(str(tmp_path), (), (), {}))
