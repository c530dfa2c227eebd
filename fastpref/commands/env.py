"""Versions, hardware and what fastpref would choose here, for bug reports."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from fastpref import __version__, require_matching_kernels
from fastpref.base import cache_root

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow")
OPTIONAL_PACKAGES = ("flash-attn", "trl", "datasets", "peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fastpref env`."""
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")


def run(args: argparse.Namespace) -> int:
    """Print the environment; 0 always, since a broken part is what it is there to show."""
    found = describe()
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    width = max(map(len, found))
    for name, value in found.items():
        lines = value if isinstance(value, list) else [value or "not installed"]
        for index, line in enumerate(lines or ["none"]):
            print(f"{name if index == 0 else '':<{width}}  {line}")
    return 0


def describe() -> dict[str, Any]:
    """Name -> value of everything `fastpref env` shows; values are text, numbers, lists or None."""
    found: dict[str, Any] = {"fastpref": __version__, "fastpref_kernels": _kernels()}
    found["python"] = f"{platform.python_version()} ({platform.python_implementation()})"
    found["system"] = platform.platform()
    found |= {name: _version(name) for name in PACKAGES + OPTIONAL_PACKAGES}
    found["cuda"] = torch.version.cuda or "none (CPU build of torch)"
    found["gpu"] = _gpus()
    found["cpu"] = _cpu_model()
    found["cores"] = _cores()
    found["threads"] = torch.get_num_threads()
    found["memory"] = _memory()
    found["cache folder"] = str(cache_root())
    on_gpu = torch.cuda.is_available()
    found["device auto"] = "cuda" if on_gpu else "cpu"
    found["dtype auto"] = "bfloat16" if on_gpu else "float32"
    found["backend auto"] = _backend()
    found["CPU passes"] = _passes()
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernels() -> str:
    try:
        return require_matching_kernels()
    except ImportError as error:
        return f"unusable: {error}"


def _backend() -> str:
    try:
        from fastpref_kernels._launch import resolve_backend

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return resolve_backend("auto", device)
    except ImportError as error:
        return f"unusable: {error}"


def _passes() -> str:
    from fastpref_kernels import _native

    return "C" if _native.library() else "torch's calls (no C compiler, or FASTPREF_NATIVE=0)"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}" for p in properties
    ]


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Cores this process may use: containers and taskset give fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
