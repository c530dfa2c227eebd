"""Ranks and reductions, from the environment that torchrun sets. With one process all are no-ops.

No object is pickled on the way: text and flags travel as tensors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 32 * 1024**2


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"environment variable {name}: expected a whole number, got {text!r}")
    return int(text)


def rank() -> int:
    """Number of this process among all, 0 when alone."""
    return _environment("RANK", 0)


def world_size() -> int:
    """Number of processes, 1 when alone."""
    return _environment("WORLD_SIZE", 1)


def local_rank() -> int:
    """Number of this process on its machine: the index of its GPU."""
    return _environment("LOCAL_RANK", 0)


def is_main() -> bool:
    """Whether this process writes the files and the progress bar."""
    return rank() == 0


def start(device_type: str) -> None:
    """Join the other processes: NCCL for "cuda", gloo for "cpu". Nothing when alone."""
    if world_size() == 1 or dist.is_initialized():
        return
    if device_type == "cuda":
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")


def stop() -> None:
    """Leave the other processes. Nothing when alone."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all ranks, in place; returns `tensor`."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather(tensor: Tensor) -> list[Tensor]:
    """Tensors of one shape and dtype from every rank, in rank order."""
    if world_size() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def all_gather_rows(rows: Tensor) -> list[Tensor]:
    """The (n, C) matrices of all ranks in rank order; n may differ between ranks and be 0."""
    if world_size() == 1:
        return [rows]
    counts = [int(n) for n in all_gather(torch.tensor(len(rows), device=rows.device))]
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows
    return [part[:n] for part, n in zip(all_gather(padded), counts, strict=True)]


def all_reduce_gradients(
    parameters: Iterable[nn.Parameter], bucket_bytes: int = BUCKET_BYTES
) -> None:
    """Sum every gradient over all ranks, in place; not a mean, since losses are divided by the
    global number of pairs already.

    Gradients travel in flat buckets whose limits depend on the parameters' order and sizes alone,
    so that the same run adds in the same order. A rank without a gradient (it had no pair in this
    step) counts as zero. All ranks must pass the same parameters.
    """
    if world_size() == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    for bucket in _buckets(trained, bucket_bytes):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        offset = 0
        for parameter, gradient in zip(bucket, gradients, strict=True):
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()
            parameter.grad = gradient


def _buckets(parameters: Sequence[nn.Parameter], limit: int) -> Iterator[list[nn.Parameter]]:
    """Consecutive runs of one dtype and device that hold at most `limit` bytes (or one tensor)."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        more = parameter.numel() * parameter.element_size()
        alike = bucket and (bucket[0].dtype, bucket[0].device) == (
            parameter.dtype,
            parameter.device,
        )
        if bucket and (not alike or size + more > limit):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += more
    if bucket:
        yield bucket


def broadcast_text(text: str, device: torch.device) -> str:
    """Rank 0's `text` on every rank; the others' argument is ignored."""
    if world_size() == 1:
        return text
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([data.numel()], dtype=torch.int64, device=device)
    dist.broadcast(length, src=0)
    if not is_main():
        data = torch.empty(int(length), dtype=torch.uint8, device=device)
    if data.numel():
        dist.broadcast(data, src=0)
    return bytes(data.tolist()).decode()


def broadcast_number(number: float, device: torch.device) -> float:
    """Rank 0's `number` on every rank; the others' argument is ignored."""
    if world_size() == 1:
        return number
    data = torch.tensor([number], dtype=torch.float64, device=device)
    dist.broadcast(data, src=0)
    return float(data)


def check_same(what: str, text: str, device: torch.device) -> None:
    """Raise ValueError on every rank unless all have the same `text` (a digest, a path)."""
    if world_size() == 1:
        return
    digest = list(hashlib.sha256(text.encode()).digest())
    parts = all_gather(torch.tensor(digest, dtype=torch.uint8, device=device))
    other = [r for r, part in enumerate(parts) if not torch.equal(part, parts[0])]
    if other:
        raise ValueError(
            f"{what} differs between ranks: rank 0 and rank {', '.join(map(str, other))} disagree; "
            f"all ranks need the same files and options (rank {rank()} has {text[:80]!r})"
        )
