"""Two answers side by side: which words are not in the other one."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORDS = re.compile(r"\s+|[^\s\w]|\w+")


def marked(text: str, other: str) -> list[tuple[str, bool]]:
    """A text in stretches, and of each whether it is not in the other text, in the order of both.

    Spaces belong to a stretch that is not in the other text where they are within it.

    Args:
        text: What is shown.
        other: What it is compared with, word by word.
    """
    words, theirs = _WORDS.findall(text), _WORDS.findall(other)
    at = [number for number, word in enumerate(words) if not word.isspace()]
    # That two texts share the space between other words says nothing.
    common = _common([words[number] for number in at], [word for word in theirs if not word.isspace()])
    own = [False] * len(words)
    for number, shared in zip(at, common, strict=True):
        own[number] = not shared
    for number in set(range(len(words))).difference(at):
        beside = own[max(0, number - 1) : number] + own[number + 1 : number + 2]
        own[number] = bool(beside) and all(beside)
    found = list[tuple[str, bool]]()
    for word, is_own in zip(words, own, strict=True):
        if found and found[-1][1] == is_own:
            found[-1] = found[-1][0] + word, is_own
        else:
            found.append((word, is_own))
    return found


def _common(words: Sequence[str], others: Sequence[str]) -> list[bool]:
    """Of each word whether it is in a longest common subsequence of both.

    By bits of whole numbers (Hyyro 2004): `difflib` takes seconds, or minutes, for a word that a model repeats without
    end. A row has a zero where the subsequence of the words so far grows with that one of the others.
    """
    places = dict[str, int]()
    for number, other in enumerate(others):
        places[other] = places.get(other, 0) | 1 << number
    all_ones = (1 << len(others)) - 1
    rows = [all_ones]
    for word in words:
        row = rows[-1]
        matches = row & places.get(word, 0)
        rows.append((row + matches | row - matches) & all_ones)
    found, row_at, place = [False] * len(words), len(words), len(others)
    while row_at and place:
        if rows[row_at] >> place - 1 & 1:
            place -= 1
            continue
        row_at -= 1
        if rows[row_at] >> place - 1 & 1:
            found[row_at] = True
            place -= 1
    return found
