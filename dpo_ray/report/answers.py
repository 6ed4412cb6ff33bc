"""Two answers side by side: which words are not in the other one."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

_WORDS = re.compile(r"\s+|[^\s\w]|\w+")


def marked(text: str, other: str) -> list[tuple[str, bool]]:
    """A text in stretches, and of each whether it is not in the other text, in the order of both.

    Spaces between two stretches of a kind belong to them.

    Args:
        text: What is shown.
        other: What it is compared with, word by word.
    """
    words, theirs = _WORDS.findall(text), _WORDS.findall(other)
    own = [True] * len(words)
    for block in SequenceMatcher(None, words, theirs, autojunk=False).get_matching_blocks():
        own[block.a : block.a + block.size] = [False] * block.size
    for at in range(1, len(words) - 1):
        # That two texts share the space between other words says nothing.
        if words[at].isspace() and own[at - 1] and own[at + 1]:
            own[at] = True
    found = list[tuple[str, bool]]()
    for word, is_own in zip(words, own, strict=True):
        if found and found[-1][1] == is_own:
            found[-1] = found[-1][0] + word, is_own
        else:
            found.append((word, is_own))
    return found
