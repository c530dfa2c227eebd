"""The CPU's passes in C: the same numbers as float64, and as torch's calls where there is no C."""

from __future__ import annotations

import itertools
import logging
import math
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpref_kernels import _native, linear_logprob, reference, sketch_dot
from fastpref_kernels.column_sums import normalised
from fastpref_kernels.projection import Projection, buckets_of, native_signs
from fastpref_kernels.row_sums import FLOOR
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.cases import assert_no_worse, make_case, run, set_width

SIZES = [(1, 1), (3, 7), (33, 16), (257, 130), (4096, 33)]
EPS = torch.finfo(torch.float32).eps

compiled = pytest.mark.skipif(_native.library() is None, reason="no C compiler")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "library", lambda: None)


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what `library` remembers."""
    monkeypatch.setattr(_native, "library", _native.library.__wrapped__)


def logits(rows: int, cols: int, spread: float = 30.0) -> Tensor:
    g = torch.Generator().manual_seed(rows + cols)
    return spread * torch.randn(rows, cols, generator=g)


def test_c_is_compiled_wherever_these_tests_run() -> None:
    """A compiler is what the other tests need; a machine without is for those `without`."""
    assert _native.library() is not None


def test_c_has_no_warnings(tmp_path: Path) -> None:
    # psabi: of functions that nobody else calls
    quiet = ["-Wno-unknown-pragmas", "-Wno-psabi"]
    flags = [*_native.FLAGS, "-Wall", "-Wextra", *quiet, "-Werror", "-c"]
    command = ["cc", *flags, str(_native.SOURCE), "-o", str(tmp_path / "native.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@compiled
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names its registers")
@pytest.mark.parametrize("without", ["avx512f", "avx2", "avx"])
@pytest.mark.usefixtures("anew")
def test_narrower_registers(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written for each width of them, where the processor has wider ones."""
    monkeypatch.setenv("CC", f"cc -mno-{without}")
    found = _native.library()
    assert found is not None
    monkeypatch.setattr(_native, "library", lambda: found)
    for k, cols in itertools.product((9, 16, 64, 4096), (1, 37, 300)):
        test_projection(k, cols)
    for k in (9, 16, 33, 512):
        test_sketches_of_linear_layers(k)
    for k in (4, 16):
        test_sketches_of_vectors(k)


@compiled
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_maxima_and_exponentials(rows: int, cols: int) -> None:
    z = logits(rows, cols)
    maximum = _native.column_maxima(z)
    assert torch.equal(maximum, z.amax(0))
    true = (z.double() - maximum.double()).clamp(min=FLOOR).exp()
    logs = (z - maximum).double().clamp(min=FLOOR)
    total, plogp, square = _native.exp_sums_(z, maximum, FLOOR, plogp=True, square=True)
    # The shift is rounded to half an ulp of at most 128; the exponential itself to two.
    assert ((z / true - 1).abs() <= 70 * EPS).all()
    assert torch.equal(z == 1, true == 1)
    own = z.double()
    assert plogp is not None and square is not None
    for found, sums in ((total, own), (plogp, own * logs), (square, own.square())):
        assert ((found - sums.sum(0)).abs() <= 20 * EPS * sums.abs().sum(0)).all()
    alone = _native.exp_sums_(logits(rows, cols), maximum, FLOOR)
    assert torch.equal(alone[0], total) and alone[1] is None and alone[2] is None


@compiled
def test_the_same_bits_with_every_number_of_threads() -> None:
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            z = logits(4099, 37)
            sums = _native.exp_sums_(z, _native.column_maxima(z), FLOOR, True, True)
            found.append([z, *sums])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@compiled
def test_what_is_no_number_is_seen() -> None:
    z = logits(100, 6)
    z[5, 0], z[7, 1], z[50, 2], z[:, 3] = torch.nan, torch.inf, -torch.inf, -torch.inf
    maximum = _native.column_maxima(z)
    total, *_ = _native.exp_sums_(z, maximum, FLOOR)
    assert torch.isnan(total[[0, 1, 3]]).all() and torch.isfinite(total[[2, 4, 5]]).all()
    assert z[50, 2] == pytest.approx(math.exp(FLOOR), rel=1e-6)


@pytest.mark.parametrize("width", [60, 16])
@pytest.mark.parametrize("stats", [(), ("entropy",)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_row_of_no_numbers_has_no_log_prob(
    width: int, stats: tuple[str, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of a row that is certain, which a maximum of -inf tells."""
    set_width(monkeypatch, width)
    hidden, weight = torch.randn(3, 4), torch.randn(50, 4)
    hidden[1] = torch.nan
    more = {"bias": torch.zeros(50)} if bias else {}
    logp = linear_logprob(hidden, weight, torch.tensor([1, 2, 3]), stats=stats, **more).logp
    assert logp.isnan().tolist() == [False, True, False]


@compiled
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("vocab", "rows"), [(2, 1), (300, 17), (4096, 64)])
def test_one_tile(vocab: int, rows: int, keep: bool) -> None:
    z = logits(vocab, rows, 5.0)
    target = torch.randint(0, vocab, (2 * rows,))[::2]  # not contiguous
    place = target.unsqueeze(0)
    own = z.gather(0, place).squeeze(0)
    others = z.double().scatter(0, place, -torch.inf)
    exp = z.clone()
    state, logp = _native.one_tile_(exp, target, FLOOR, keep)
    maximum, total, odds = state
    assert torch.equal(maximum, others.amax(0).float())
    sums = (others - maximum).exp().sum(0)
    true = maximum - own.double() + sums.log()
    torch.testing.assert_close(total.double(), sums, rtol=20 * EPS, atol=0.0)
    torch.testing.assert_close(odds.double(), true, rtol=4 * EPS, atol=40 * EPS)
    torch.testing.assert_close(
        logp.double(), torch.nn.functional.logsigmoid(-odds.double()), rtol=4 * EPS, atol=0.0
    )
    if keep:
        assert torch.equal(exp.gather(0, place).squeeze(0), -total)
    assert torch.equal(_native.log_odds(maximum, total, own), odds)
    assert torch.equal(_native.log_probs(odds), logp)


def test_log_probs_at_both_ends() -> None:
    odds = torch.tensor([-torch.inf, -200.0, -20.0, 0.0, 20.0, 200.0, torch.inf])
    true = -torch.logaddexp(odds.double(), torch.zeros(7, dtype=torch.float64))
    torch.testing.assert_close(_native.log_probs(odds).double(), true, rtol=4 * EPS, atol=1e-80)


COUNTS = [3, 0, 41, 1, 0]


def segments() -> tuple[Tensor, Tensor]:
    """first (S + 1,), and the segment of every row."""
    return torch.tensor([0, *itertools.accumulate(COUNTS)]), torch.arange(
        len(COUNTS)
    ).repeat_interleave(torch.tensor(COUNTS))


@compiled
@pytest.mark.parametrize(("a", "b"), [(1, 1), (5, 7), (16, 16)])
def test_products_over_segments(a: int, b: int) -> None:
    first, segment = segments()
    y, x = (logits(sum(COUNTS), n, 1.0)[:, :n].contiguous() for n in (a, b))
    out = torch.ones(len(COUNTS), a, b)
    _native.segment_products_(out, y, x, first, 0.25)
    true = torch.ones(len(COUNTS), a, b, dtype=torch.float64)
    true.index_add_(0, segment, 0.25 * torch.einsum("ta,tb->tab", y.double(), x.double()))
    torch.testing.assert_close(out.double(), true, rtol=1e-5, atol=1e-5)


@compiled
@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize("cols", [1, 16, 37])
@pytest.mark.parametrize("kind", ["alone", "rms", "centred"])
def test_sums_over_segments(heads: int, cols: int, kind: str) -> None:
    first, segment = segments()
    shape = (sum(COUNTS), heads, cols) if heads else (sum(COUNTS), cols)
    y, x = torch.randn(shape), torch.randn(shape) + 3.0
    found = _native.segment_sums(
        y, None if kind == "alone" else x, first, 1e-5, centred=kind == "centred"
    )
    wide, other = y.double(), x.double()
    if kind == "alone":
        rows = wide
    else:
        rows = wide * normalised(other, 1e-5, kind == "centred")
    true = torch.zeros(len(COUNTS), cols, dtype=torch.float64)
    true.index_add_(0, segment, rows.sum(1) if heads else rows)
    torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize("k", [2, 5, 16])
def test_estimates_of_sketches(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(3, 4, k, k), torch.randn(3, 4, k, k)
    found = [sketch_dot(a, b), sketch_dot(a)]
    assert all(x.dtype == torch.float64 for own in found for x in own)
    monkeypatch.setattr(_native, "library", lambda: None)
    for own, true in zip(found, (sketch_dot(a, b), sketch_dot(a)), strict=True):
        torch.testing.assert_close(own.value, true.value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own.error, true.error, rtol=1e-9, atol=1e-12)


def test_an_estimate_of_no_number_has_no_error() -> None:
    a = torch.randn(2, 4, 4)
    a[0, 0, 0] = torch.nan
    found = sketch_dot(a)
    assert found.value.isnan().tolist() == found.error.isnan().tolist() == [True, False]


def test_whoever_looks_on_at_an_estimate_sees_torch() -> None:
    """Gradients, transforms, fake tensors, graphs: none of them knows of C."""
    a = torch.randn(3, 4, 4, requires_grad=True)
    plain = sketch_dot(a.detach())
    found = sketch_dot(a)
    (grad,) = torch.autograd.grad(found.value.sum(), a)
    torch.testing.assert_close(grad, 2 * a.detach())
    own = a.detach()
    for other in (torch.vmap(lambda x: sketch_dot(x).value)(own), found.value.detach()):
        torch.testing.assert_close(other, plain.value, rtol=1e-12, atol=1e-12)
    negative = sketch_dot(own, torch._neg_view(own)).value
    torch.testing.assert_close(negative, -plain.value, rtol=1e-12, atol=1e-12)
    compiled_ = torch.compile(sketch_dot, fullgraph=True, backend="eager")(own)
    torch.testing.assert_close(compiled_.error, plain.error, rtol=1e-9, atol=1e-12)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert sketch_dot(own).value.shape == (3,)


@compiled
@pytest.mark.parametrize("k", [9, 16, 20, 64, 256, 4096, 10000])
@pytest.mark.parametrize("cols", [1, 16, 37, 300])
def test_projection(k: int, cols: int) -> None:
    """As the product with the signs: of rows of a wider matrix, of as many as no tile has."""
    side, first = Projection.of(3, "a", "in"), 2 * buckets_of(k)
    x = torch.randn(45, cols + 3)[:, :cols]
    true = x.double() @ side.signs(torch.arange(first, first + cols), k, torch.float64)
    own = signs(side, first, cols, k)
    torch.testing.assert_close(_native.project(x, own).double(), true, rtol=1e-5, atol=1e-4)


def signs(side: Projection, first: int, cols: int, k: int) -> _native.Signs:
    found = native_signs(side, first, cols, k)
    assert found is not None
    return found


@compiled
@pytest.mark.parametrize("k", [9, 16, 33, 512])
def test_sketches_of_linear_layers(k: int) -> None:
    """Two layers of one input and one of another, which are of one group; rows of wider matrices,
    in a row of tokens or not, more of them than are projected at a time."""
    counts = [0, 1, 37, 0, 2 * _native.NARROW // k + 5, 8]
    first, rows = torch.tensor([0, *itertools.accumulate(counts)]), sum(counts)
    widths = {"in": 37, "q": 21, "k": 16, "up in": 5, "up": 300}
    sides = {name: Projection.of(3, name, "in") for name in widths}
    x = {name: torch.randn(1, rows, cols + 3)[..., :cols] for name, cols in widths.items()}
    x["k"] = x["k"][0]
    groups = {"in": 1, "up in": 1}
    layers = _native.LinearSketches(
        [
            (i, cols, signs(sides[n], 0, cols, k), groups.get(n, -1))
            for i, (n, cols) in enumerate(widths.items())
        ]
    )
    out = torch.ones(3, len(counts), k, k)
    sums = _native.Sums(torch.zeros(3, len(counts)), out, first, 0.25 * k)
    assert layers.add_(sums, list(x.values()))
    wide = {
        n: x[n].double().view(rows, -1) @ sides[n].signs(torch.arange(cols), k, torch.float64)
        for n, cols in widths.items()
    }
    true = torch.ones(3, len(counts), k, k, dtype=torch.float64)
    for s, (a, b) in enumerate(itertools.pairwise(first.tolist())):
        true[1, s] += 0.25 * (wide["q"] + wide["k"])[a:b].t() @ wide["in"][a:b]
        true[1, s] += 0.25 * wide["up"][a:b].t() @ wide["up in"][a:b]
    torch.testing.assert_close(out.double(), true, rtol=1e-4, atol=1e-3)


@compiled
@pytest.mark.parametrize("k", [4, 16])
def test_sketches_of_vectors(k: int) -> None:
    first, segment = segments()
    tokens, widths = sum(COUNTS), (37, 300, 16)
    y = [torch.randn(1, tokens, widths[0]), torch.randn(tokens, 3, widths[1])]
    y += [torch.randn(tokens, widths[2])]
    x = [None, torch.randn(tokens, 3, widths[1]) + 2.0, torch.randn(tokens, widths[2]) + 2.0]
    kinds, groups = (_native.ALONE, _native.CENTRED, _native.RMS), (1, 0, 1)
    sides = [Projection.of(3, str(n), "vector") for n in widths]
    own = [signs(side, 0, n, k * k) for side, n in zip(sides, widths, strict=True)]
    norm_sq, sketch = torch.ones(2, len(COUNTS)), torch.ones(2, len(COUNTS), k, k)
    numbers = ((0, 1, 2), (3, 4, 5))
    vectors = zip(*numbers, widths, kinds, [1e-5] * 3, own, groups, strict=True)
    sums = _native.Sums(norm_sq, sketch, first, 0.5 * k)
    assert _native.VectorSketches(list(vectors)).add_(sums, [*y, *x])
    true = torch.ones(2, len(COUNTS)).double(), torch.ones(2, len(COUNTS), k * k).double()
    for one, other, side, width, group in zip(y, x, sides, widths, groups, strict=True):
        rows = one.double().view(tokens, -1, width)
        if other is not None:
            wide = other.double().view(tokens, -1, width)
            rows = rows * normalised(wide, 1e-5, group == 0)
        sums = torch.zeros(len(COUNTS), width, dtype=torch.float64)
        sums.index_add_(0, segment, rows.sum(1))
        true[0][group] += sums.square().sum(1)
        true[1][group] += 0.5 * sums @ side.signs(torch.arange(width), k * k, torch.float64)
    torch.testing.assert_close(norm_sq.double(), true[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sketch.flatten(2).double(), true[1], rtol=1e-4, atol=1e-3)


@compiled
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("counts", [[1] * 6, [4, 0, 3, 9, 0, 0], [16, 0, 0, 2, 1, 13]])
def test_norms_of_short_groups(
    counts: list[int], softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of two segments, equal targets among them, against torch's calls in float64."""
    rows = sum(counts)
    hidden, weight = torch.randn(rows, 24), torch.randn(600, 24)
    target = torch.randint(0, 600, (rows,))
    target[1] = target[0]
    segment = torch.arange(6).repeat_interleave(torch.tensor(counts))
    products = spy(monkeypatch, "group_products")
    columns = spy(monkeypatch, "project_columns_")

    def found(dtype: torch.dtype) -> Any:
        return linear_logprob(
            hidden.to(dtype).requires_grad_(),
            weight.to(dtype).requires_grad_(),
            target,
            segment_id=segment,
            num_segments=6,
            group_size=2,
            softcap=softcap,
            norms="both",
            sketch_dim=16,
        )

    own, true = found(torch.float32), found(torch.float64)
    assert len(products) == len(columns) == 1
    for name in ("gram", "sketch"):
        a, b = getattr(own, name).double(), getattr(true, name)
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def spy(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """What a function of `_native` is called with from here on."""
    calls, plain = [], getattr(_native, name)
    monkeypatch.setattr(_native, name, lambda *a: (calls.append(a), plain(*a))[1])
    return calls


@compiled
def test_sums_for_taps_are_the_same_with_every_number_of_threads() -> None:
    first, k = torch.tensor([0, 700, 701, 2100]), 16
    x, y = torch.randn(2100, 256), torch.randn(2100, 256)
    own = signs(Projection.of(3, "a", "in"), 0, 256, k)
    vector = signs(Projection.of(3, "a", "vector"), 0, 256, k * k)
    z, target, groups = torch.rand(5000, 40), torch.arange(40), torch.arange(0, 41, 8)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out, norm_sq = torch.zeros(1, 3, k, k), torch.zeros(1, 3)
            sums = _native.Sums(norm_sq, out, first, 1.0)
            _native.LinearSketches([(0, 256, own, 0), (1, 256, own, -1)]).add_(sums, [x, y])
            _native.segment_products_(out[0], x[:, :k].clone(), y[:, :k].clone(), first, 1.0)
            norm = [(1, 0, 256, _native.RMS, 1e-5, vector, 0)]
            _native.VectorSketches(norm).add_(sums, [x, y])
            columns = torch.zeros(k, 40)
            _native.project_columns_(columns, z, (torch.arange(5000) % 16).int(), z[:, 0], 16)
            rows = _native.segment_sums(y, x, first, 1e-5, False)
            products = _native.group_products(z, target, groups, 8)
            found.append([_native.project(x, own), out, norm_sq, columns, rows, *products])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_c_may_not_work_on() -> None:
    z = logits(8, 8)
    assert _native.fits(z)
    for other in (z.double(), z.t()[::2], z.to("meta"), torch.nn.Parameter(z)):
        assert not _native.fits(other)


@compiled
def test_what_sketches_in_c_may_not_work_on() -> None:
    z, k = logits(8, 16), 16
    own = signs(Projection.of(3, "a", "in"), 0, 16, k)
    vector = signs(Projection.of(3, "a", "vector"), 0, 16, k * k)
    norm_sq, sketch = torch.zeros(1, 1), torch.zeros(1, 1, k, k)
    sums = _native.Sums(norm_sq, sketch, torch.tensor([0, 8]), 1.0)
    linear = _native.LinearSketches([(0, 16, own, 0), (1, 16, own, -1)])
    norm = _native.VectorSketches([(0, 1, 16, _native.RMS, 1e-5, vector, 0)])
    negative = torch.complex(z, z).conj().imag
    turned = logits(16, 8).t()
    for other in (z.double(), turned, torch.nn.Parameter(z), negative):
        for given in ([other, z], [z, other]):
            assert not linear.add_(sums, given)
            assert not norm.add_(sums, given)
    assert not norm.add_(sums, [torch.randn(8, 20)[:, :16], z])
    assert not sketch.any() and not norm_sq.any()


@pytest.mark.parametrize("width", [50, 400])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cache", [-1, 1])
@pytest.mark.parametrize("spread", [2.0, 150.0])
@pytest.mark.parametrize("stats", [(), ("entropy", "sum_sq_prob")])  # none: one_tile.py
@pytest.mark.usefixtures("without")
def test_the_head_without_c(
    width: int,
    bias: bool,
    cache: int,
    spread: float,
    stats: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_width(monkeypatch, width)
    case = make_case(21, 16, 301, dtype=torch.float32, segments=6, bias=bias, spread=spread)
    truth = run(reference.linear_logprob, case.to(torch.float64))
    naive = run(reference.linear_logprob, case)
    ours = run(linear_logprob, case, cache=cache, stats=stats)
    assert_no_worse(ours, naive, truth, torch.float32, scale=1.0 + spread)


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("FASTPREF_NATIVE", "0", None),
        ("CC", "no-such-compiler", "no C compiler (no-such-compiler)"),
        ("CC", "false", "native.c was not compiled"),
        ("CC", "'cc", "No closing quotation"),
    ],
)
def test_no_library(name: str, value: str, says: str | None, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setenv(name, value)
    with caplog.at_level(logging.INFO, logger="fastpref_kernels"):
        assert _native.library() is None
    assert (says in caplog.text) if says else not caplog.text


@pytest.mark.usefixtures("anew")
def test_no_library_where_nothing_can_be_written(monkeypatch: Any, caplog: Any) -> None:
    def refuse(**_: object) -> None:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(_native.tempfile, "TemporaryDirectory", refuse)
    with caplog.at_level(logging.WARNING, logger="fastpref_kernels"):
        assert _native.library() is None
    assert "no usable temporary directory" in caplog.text
