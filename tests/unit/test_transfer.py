"""Tensors of all kinds reach the host in one copy, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastpref import transfer
from fastpref.transfer import HostCopy, to_host

KINDS = (torch.int64, torch.int32, torch.uint8, torch.float64, torch.float32, torch.float16)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(0, 200, (6, 4), generator=generator)
    found = {str(kind): base.to(kind) for kind in KINDS}
    found |= {
        "bool": base > 100,
        "nan": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "largest": torch.tensor([2**63 - 1, -(2**63), 2**53 + 1]),
        "scalar": torch.tensor(0.1, dtype=torch.float64),
        "nothing": torch.empty(0, 3),
        "transposed": base.t(),
        "column": base[:, 1],
        "one of a column": base[:1, 1],
        "expanded": torch.tensor(7).expand(5),
        "learned": torch.ones(3, requires_grad=True),
    }
    return found


def test_every_kind_arrives_exactly() -> None:
    sets = [tensors(), {}, {"again": torch.arange(3)}]
    found = to_host(sets)
    assert [set(own) for own in found] == [set(own) for own in sets]
    for own, sent in zip(found, sets, strict=True):
        for name, tensor in sent.items():
            want = tensor.detach().contiguous().numpy()
            assert own[name].dtype == want.dtype and own[name].shape == want.shape, name
            assert own[name].tobytes() == want.tobytes(), name
            assert own[name].flags.aligned, name


def test_the_way_to_the_device_is_exact_too() -> None:
    named = sorted(tensors().items(), key=lambda entry: -entry[1].itemsize)
    packed = transfer._pack([x for _, x in named])
    found = transfer._parts(packed.clone(), named)
    for name, sent in named:
        assert found[name].dtype == sent.dtype and found[name].shape == sent.shape, name
        assert found[name].numpy().tobytes() == sent.detach().contiguous().numpy().tobytes(), name
    plain = transfer.to_device(tensors(), "cpu")
    assert all(torch.equal(plain[n], x) or n == "nan" for n, x in tensors().items())


def test_all_of_it_is_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = transfer._Copy

    def counted(packed: torch.Tensor) -> transfer._Copy:
        sizes.append(packed.numel())
        return real(packed)

    monkeypatch.setattr(transfer, "_Copy", counted)
    copy = HostCopy([tensors(), tensors()])
    assert copy.get() is copy.get()
    assert sizes == [2 * sum(x.numel() * x.itemsize for x in tensors().values())]
    assert to_host([]) == [] and to_host([{}, {}]) == [{}, {}] and len(sizes) == 1


def test_what_is_sent_is_a_snapshot() -> None:
    """The step that follows may overwrite the tensor before the copy is asked for."""
    values = torch.zeros(4)
    copy = HostCopy([{"values": values}])
    values += 1
    np.testing.assert_array_equal(copy.get()[0]["values"], np.zeros(4, np.float32))
