"""How much memory a device has, and sizes as people write them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

# Device context, cuBLAS' workspaces, compiled kernels; of a device that runs already less, because
# its context is no part of what is free.
CONTEXT, WORKSPACES = 1 << 30, 1 << 28
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """What a run may take, in bytes."""

    name: str
    size: int
    gpu: bool
    context: int = 0  # bytes that are none of the run's tensors

    @staticmethod
    def of(device: torch.device) -> Memory:
        """What is free of a device now."""
        if device.type != "cuda":
            return Memory("memory of this machine", available(), False)
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)
        name = torch.cuda.get_device_name(device)
        return Memory(f"{name} ({device})", free + held, True, WORKSPACES)

    @staticmethod
    def of_gpu(size: int) -> Memory:
        """Of a GPU that is not here."""
        return Memory("a GPU", size, True, CONTEXT)


def available() -> int:
    """Bytes of this machine's memory that can be had without swapping; of its cgroup, if less."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    info = Path("/proc/meminfo")
    if info.exists():
        match = re.search(r"^MemAvailable:\s+(\d+) kB", info.read_text(encoding="utf-8"), re.M)
        found = int(match[1]) * 1024 if match else found
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists():
        most = limit.read_text(encoding="utf-8").strip()
        if most.isdecimal():
            found = min(found, int(most) - int(used.read_text(encoding="utf-8")))
    return max(found, 0)


def read_size(text: str) -> int:
    """Bytes of `80GB` (10^9), `80GiB` (2^30) or `80G` (10^9); ValueError for what is no size."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match:
        unit = match[2].upper()
        if not match[3] or unit:
            size = int(float(match[1]) * (BINARY[unit] if match[3] else UNITS[unit]))
            if size > 0:
                return size
    raise ValueError(f"expected a size such as 80GB or 24GiB, got {text!r}")


def gib(size: int) -> str:
    """For tables: GiB, or MiB of little."""
    return f"{size / 2**30:10.2f} GiB" if size >= 2**30 else f"{size / 2**20:10.2f} MiB"
