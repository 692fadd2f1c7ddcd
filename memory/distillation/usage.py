"""Cores and memory that training and evaluation take from the process that they share with a server."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch's threads for this thread of Python; 0 changes nothing.

    Threads that have used torch before keep their number. Those that first use it within the block take this one.
    """
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count:
            torch.set_num_threads(before)


def give_back_memory() -> None:
    """Activations of every size leave the C library with free memory that it keeps: 0.6 GB of SmolLM2. Linux only."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
