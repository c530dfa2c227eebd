"""`python -m bench roofline --check`: what the fused head asks of a GPU, counted from its calls.

The Triton backend runs on tensors of the meta device: every torch operation and kernel launch is
seen with its shapes, nothing is computed and no memory taken. Counted: matrix products, in units
of 2 R V D operations; bytes that everything but the products reads and writes, those of tiles of
logits apart from the rest; and the most bytes that exist at once beyond the inputs, the gradients
returned included. A product's own traffic is the library's affair. No time is measured or claimed.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import measure, results

HELP = "products, bytes and memory of the fused head, counted from its calls"
# name -> (tiles of E kept, weight trained, hidden trained)
CASES = {
    "all_kept": (-1, True, True),
    "none_kept": (0, True, True),
    "frozen": (0, False, True),
    "no_grad": (0, False, False),
}
VIEWS = ("view", "slice", "select", "t", "unsqueeze", "transpose", "detach", "alias", "unbind")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's command line."""
    add = parser.add_argument
    add("--check", action="store_true", help="exit with 1 where a target is missed")
    add("--rows", type=int, default=8192)
    add("--dim", type=int, default=4096)
    add("--vocab", type=int, default=128256)
    add("--no_record", action="store_true", help="append nothing to bench/results")


def run(arguments: argparse.Namespace) -> int:
    """Count, print, record; 1 where `--check` finds a target missed."""
    shape = (arguments.rows, arguments.dim, arguments.vocab)
    counts = {name: count(*shape, *case) for name, case in CASES.items()}
    values = {
        f"{what}_{name}": {"value": value}
        for name, counted in counts.items()
        for what, value in counted.values(*shape).items()
    }
    checks = results.verdicts("roofline", {k: v["value"] for k, v in values.items()})
    setting = {"rows": shape[0], "dim": shape[1], "vocab": shape[2], "dtype": "bfloat16"}
    record = results.record_of(
        "roofline", measure.surroundings("counted"), setting, {}, dict(values), checks
    )
    print("\n".join(results.ratio_lines(dict(values), checks)))
    return results.close(arguments, record, checks)


@dataclass
class Counted:
    """Sums over the calls that were seen."""

    rows_by_dim: int  # entries of an (R, D) tensor: what is larger is a tile of logits, or of dW
    operations: int = 0
    logit_bytes: int = 0
    other_bytes: int = 0
    logit_passes: int = 0  # calls that read or write such a tile, products apart
    live: int = 0
    peak: int = 0
    _known: set[int] = field(default_factory=set)

    def values(self, rows: int, dim: int, vocab: int) -> dict[str, float]:
        """In the units that targets.toml has."""
        return {
            "products": self.operations / (2 * rows * dim * vocab),
            "logits_gb": self.logit_bytes / 1e9,
            "rows_gb": self.other_bytes / 1e9,
            "passes": float(self.logit_passes),
            "memory_gb": self.peak / 1e9,
        }

    def moved(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Bytes of one call, given (entries, bytes) of what it reads and writes."""
        large = False
        for entries, size in sizes:
            if entries > self.rows_by_dim:
                self.logit_bytes, large = self.logit_bytes + size, True
            else:
                self.other_bytes += size
        self.logit_passes += large

    def given(self, *tensors: Tensor) -> None:
        """Inputs, whose memory does not count."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def exists(self, tensor: Tensor) -> None:
        """Count the tensor's memory until it is given back."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def launched(self, launch: Any) -> None:
        """A kernel's launch (`fastpref_kernels._launch.Launch`)."""
        sizes = []
        for name, value in launch.arguments.items():
            if isinstance(value, Tensor):
                times = 2 if name in launch.rewritten else 1
                size = launch.touched.get(name, times * value.numel() * value.itemsize)
                sizes.append(
                    (size // value.itemsize if name in launch.touched else value.numel(), size)
                )
        self.moved(sizes)


class _Seen(TorchDispatchMode):
    """Counts every torch operation."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        # new_zeros and the like take no more than dtype and device of the tensor they are given.
        inputs = () if name.startswith("new_") else (args, kwargs)
        tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        produced = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in produced:
            self.counted.exists(tensor)
        if name in ("mm", "addmm", "bmm", "mv", "addmv", "baddbmm"):
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            self.counted.operations += 2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)
        elif name not in VIEWS and not name.startswith(("empty", "new_empty", "_unsafe_view")):
            written = {id(x) for x in tensors}
            every = tensors + [x for x in produced if id(x) not in written]
            self.counted.moved((x.numel(), x.numel() * x.itemsize) for x in every)
        return out


def count(
    rows: int, dim: int, vocab: int, cache: int, train_weight: bool, train_hidden: bool
) -> Counted:
    """One forward and backward in bfloat16, a segment for every row."""
    from fastpref_kernels import _launch, head_op
    from fastpref_kernels._head_checks import Described
    from fastpref_kernels._plan import make_plan

    options: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    hidden = torch.empty(rows, dim, **options, requires_grad=train_hidden)
    weight = torch.empty(vocab, dim, **options, requires_grad=train_weight)
    target = torch.empty(rows, device="meta", dtype=torch.int64)
    grad = torch.empty(rows, device="meta")
    plan = make_plan(Described.of(hidden), Described.of(weight), None, cache, 0, True)
    counted = Counted(rows_by_dim=prod(hidden.shape))
    hidden, weight = hidden.detach(), weight.detach()
    counted.given(hidden, weight, target, grad)
    with torch.no_grad(), _launch.recorded(counted.launched), _Seen(counted):
        scales = [1.0, 1.0]
        out = head_op.forward(hidden, weight, target, None, None, rows, scales, plan, "", "")
        if train_weight or train_hidden:
            inputs: list[Any] = [grad, hidden, weight, target, None, None, *out[-4:], scales, plan]
            returned = head_op.backward(*inputs)
            del returned
    return counted
