"""Start-up under plain Python or torchrun."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """Where this process stands. rank 0 writes and talks."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over ranks (a new tensor)."""
        return self.total(values) / self.size

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over ranks (a new tensor)."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The same-shaped tensor of every rank."""
        if self.size == 1:
            return [values]
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values)
        return parts

    def wait(self) -> None:
        """A barrier."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def world(device: str | None = None) -> Iterator[World]:
    """Join the process group when torchrun started us, else stand alone; leave it at the end.

    device: ``cpu``, ``cuda`` or None for CUDA where there is one.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.device("cuda", local) if kind == "cuda" else torch.device(kind)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, place)
        return
    joined = not dist.is_initialized()
    if joined:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), place)
        dist.barrier()  # a rank that leaves early tears the connections of those still at work
    finally:
        if joined:
            gc.collect()  # a wrapper that outlives its process group ends the process with an abort now and then
            dist.destroy_process_group()
