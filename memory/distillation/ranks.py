"""Several processes that train one prefix: each reads a share of a step's rows, and gradients are added up.

Started by ``torchrun``; alone, everything here does nothing. Gradients are already divided by what all rows of a step
weigh, so their sum is the gradient of the step, whatever the number of processes. The first process keeps the files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """As torch.distributed was set up; one process where it was not."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """True for the process that writes files and reports."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in one exchange. All must be float32 on one device."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """True if ``flag`` is true in any process."""
        if self.size == 1:
            return flag
        shared = torch.tensor([float(flag)], device=_device())
        dist.all_reduce(shared)
        return bool(shared.item() > 0)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def joined_ranks(backend: str | None = None) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started, for the length of the block; alone where it started none.

    ``backend``: "gloo" or "nccl"; None takes nccl where each process has a GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield Ranks.current()
        return
    if backend is None:
        each_has_one = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
        backend = "nccl" if each_has_one else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    try:
        yield Ranks.current()
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
