"""glibc's malloc, told to give back what large tensors leave behind."""

from __future__ import annotations

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 4 << 20


def return_large_blocks() -> None:
    """From now on blocks of 4 MiB and more go back to the system as soon as they are freed.

    By itself glibc raises that limit up to 32 MiB as it goes, and keeps what is smaller, activations mostly, for later
    requests that it then does not fit: a tenth of the memory of a training process. Nothing happens with another libc.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
