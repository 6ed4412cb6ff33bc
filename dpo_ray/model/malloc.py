"""glibc's malloc on CPUs, told what to do with memory that tensors leave behind. Another libc is left as it is."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> None:
    """From now on freed blocks stay with the process, to be used again: for training.

    Every step asks for what the one before has given back; by itself glibc hands much of it to the system each time,
    and getting a page anew takes far longer than writing to it.
    """
    _set(_M_TRIM_THRESHOLD, -1)  # Never: of the largest threshold, 2 GiB, a step frees more.
    _set(_M_MMAP_MAX, 0)  # No block has a mapping of its own, however large.


def return_freed_memory() -> None:
    """From now on freed blocks of 128 KiB and more go to the system at once: for a model that only just fits.

    By itself glibc keeps blocks of gathered weights in pieces that later ones do not fit: up to the size of the model.
    """
    _set(_M_MMAP_THRESHOLD, 128 << 10)  # Where glibc begins.


def _set(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(option, value)
