"""Between the device and the host: many small tensors in one copy, which nobody has to wait for.

A copy of its own for every tensor would cost a step more than what is copied: each waits for all
that the device still has to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray]


class HostCopy:
    """Sets of named tensors of one device, on their way to the host in a single copy.

    The tensors' bytes are packed into one tensor, exactly, whatever their types (NumPy must have
    them, so no bfloat16). On a CUDA device the copy goes to pinned memory behind what the device
    has been given to do, and making it does not wait; `get` does, until that copy is done, but for
    nothing that was started later. Elsewhere the copy is done when the object is there.
    """

    def __init__(self, sets: Sequence[Mapping[str, Tensor]]) -> None:
        self._arrays: list[Arrays] | None = None
        named = [(i, name, x.detach()) for i, own in enumerate(sets) for name, x in own.items()]
        # The widest types first: every array then begins at a multiple of its item's size.
        named.sort(key=lambda entry: -entry[2].itemsize)
        self._places = [(i, name, x.shape, _numpy_type(x.dtype)) for i, name, x in named]
        self._sets = len(sets)
        self._copy = _Copy(_pack([x for *_, x in named])) if named else None

    def get(self) -> list[Arrays]:
        """The sets as NumPy arrays, in the order given; the same objects at every call."""
        if self._arrays is None:
            data = self._copy() if self._copy else np.empty(0, np.uint8)
            self._arrays, self._copy = self._unpack(data), None
        return self._arrays

    def _unpack(self, data: np.ndarray) -> list[Arrays]:
        sets: list[Arrays] = [{} for _ in range(self._sets)]
        at = 0
        for i, name, shape, kind in self._places:
            size = shape.numel() * kind.itemsize
            sets[i][name] = data[at : at + size].view(kind).reshape(tuple(shape))
            at += size
        assert at == data.size
        return sets


def to_host(sets: Sequence[Mapping[str, Tensor]]) -> list[Arrays]:
    """`HostCopy` and its wait in one."""
    return HostCopy(sets).get()


def to_device(tensors: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """``tensors`` of the host on ``device``; of one CUDA device they are parts of a single copy.

    It comes from pinned memory: one from other memory may wait for all that the device has to do.
    """
    if torch.device(device).type != "cuda" or any(x.is_cuda for x in tensors.values()):
        return {name: x.to(device, non_blocking=True) for name, x in tensors.items()}
    named = sorted(tensors.items(), key=lambda entry: -entry[1].itemsize)
    return _parts(_pack([x for _, x in named]).pin_memory().to(device, non_blocking=True), named)


def numbers(
    values: Sequence[float], device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """(n,) ``values`` as ``torch.tensor`` would give them on ``device``, for which nobody waits."""
    found = torch.tensor(values, dtype=dtype)
    return to_device({"": found}, device)[""]


def _parts(packed: Tensor, named: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """What `_pack` packed, as parts of ``packed``: of the same types and shapes. The widest types
    must have stood first."""
    found, at = {}, 0
    for name, x in named:
        size = x.numel() * x.itemsize
        found[name] = packed[at : at + size].view(x.dtype).view(x.shape)
        at += size
    assert at == packed.numel()
    return found


class _Copy:
    """The one place where the device's memory is read: a copy that was started.

    Calling it waits until the copy is done and gives the bytes, (n,) uint8.
    """

    def __init__(self, packed: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if packed.is_cuda:
            self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            # On the stream that made it: the memory of `packed` is not given out before it is read.
            self._host.copy_(packed, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = packed.cpu()

    def __call__(self) -> np.ndarray:
        if self._event is None:
            return self._host.numpy()
        self._event.synchronize()
        # Pinned memory goes back to its pool at once; records may be kept for long.
        return self._host.numpy().copy()


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of all ``tensors``, one after the other."""
    flat = (x.reshape(-1) for x in tensors)
    # Bytes can be viewed of what lies without gaps: `contiguous` leaves them to a single element.
    dense = (
        x if x.stride() == (1,) else x.clone(memory_format=torch.contiguous_format) for x in flat
    )
    return torch.cat([x.view(torch.uint8) for x in dense])


def _numpy_type(kind: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=kind).numpy().dtype
