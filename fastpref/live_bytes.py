"""Bytes of tensors that are alive while something runs, by kind: of real tensors or of fake ones.

A storage is counted from the op that made it to the moment that nothing points at it any more, as
an allocator would. Of fake tensors (torch's FakeTensorMode), which have shapes and no memory, this
tells what a computation would hold without computing anything.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# Bytes that an op holds beside its results while it runs, from its arguments.
Scratch = Callable[[tuple[Any, ...]], int]


class LiveBytes(TorchDispatchMode):
    """Inside, every new storage counts as of the kind `kind`; `peak` is the composition at the
    moment when all kinds together were the most.

    ``special``: op -> the kind of what it makes, and what it holds while it runs. ``stand_ins``: op
    -> what is called in its place, of those that fake tensors refuse.
    """

    def __init__(
        self,
        special: dict[Any, tuple[str, Scratch]],
        stand_ins: dict[Any, Callable[..., Tensor]],
    ) -> None:
        super().__init__()
        self.kind = "activations"
        self.now: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self._special, self._stand_ins = special, stand_ins
        self._kinds: dict[int, str] = {}  # of storages alive, by id
        self._refs: dict[int, weakref.ref[Any]] = {}
        self._most = 0

    @property
    def total(self) -> int:
        """Bytes alive."""
        return sum(self.now.values())

    @contextmanager
    def made(self, kind: str) -> Iterator[None]:
        """Inside, what is made is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def mark(self, tensors: Iterable[Tensor], kind: str) -> None:
        """These are of this kind, whatever they were made as."""
        for tensor in tensors:
            key = id(tensor.untyped_storage())
            if key in self._kinds:
                size = tensor.untyped_storage().nbytes()
                self._add(self._kinds[key], -size)
                self._kinds[key] = kind
                self._add(kind, size)

    def restart(self) -> None:
        """Forget the peak: from here on."""
        self._most = 0
        self._look({})

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The op itself, and what it made."""
        out = self._stand_ins.get(func, func)(*args, **(kwargs or {}))
        kind, scratch = self._special.get(func, (self.kind, None))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage(), kind)
        self._look({kind: scratch(args)} if scratch else {})
        return out

    def _count(self, storage: Any, kind: str) -> None:
        key = id(storage)
        if key in self._kinds:
            return
        size, self._kinds[key] = storage.nbytes(), kind
        self._add(kind, size)

        def gone(_: Any) -> None:
            self._add(self._kinds.pop(key), -size)
            del self._refs[key]

        self._refs[key] = weakref.ref(storage, gone)

    def _add(self, kind: str, size: int) -> None:
        self.now[kind] = self.now.get(kind, 0) + size

    def _look(self, passing: dict[str, int]) -> None:
        total = self.total + sum(passing.values())
        if total > self._most:
            self._most = total
            self.peak = dict(self.now)
            for kind, size in passing.items():
                self.peak[kind] = self.peak.get(kind, 0) + size
