"""A training step on tensors without memory: what it would hold at its peak.

The model is built from its configuration alone, on torch's fake tensors, prepared as a run prepares
it, and one step runs on it: forward, backward, optimizer, every op with its shapes and no numbers.
What is alive is counted (`fastpref.live_bytes`). Only what runs outside of torch's sight is a
formula: the head's op while it runs, moments of 8 bits, quantised weights, what `track` adds.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fastpref_kernels import _launch, _native
from fastpref_kernels._plan import Plan
from fastpref_kernels.token_blocks import ENTRIES, MAX_PADDING
from torch import Tensor, nn

from fastpref import attention_torch
from fastpref.attention_backends import HALF, Backend
from fastpref.batch import PairBatch
from fastpref.config import Config
from fastpref.head import freeze_body
from fastpref.live_bytes import LiveBytes, Scratch
from fastpref.loading import reference_skeleton, skeleton
from fastpref.model import HeadNorms, PairModel
from fastpref.optim import EIGHT_BIT
from fastpref.prepare import make_optimizer
from fastpref.quantised import numbers
from fastpref.recompute import decoder_layers
from fastpref.slopes import wanted_stats

log = logging.getLogger(__name__)

KINDS = ("weights", "gradients", "optimizer", "activations", "head", "track", "reference")
# Of a GPU's attention without masks: the run's own if it is here, else one that holds as much.
FLASH = Backend("varlen", attention_torch.varlen, softcap=False, dtypes=HALF)
BLOCK_8BIT, LEAST_8BIT = (
    256,
    4096,
)  # of bitsandbytes: moments that share a scale; with 8 bits at all


@dataclasses.dataclass(frozen=True)
class Rehearsed:
    """Bytes by kind at the peak of each phase, and what of the weights learns."""

    phases: dict[str, dict[str, int]]
    weights: int  # numbers
    trained: int  # numbers

    @property
    def peak(self) -> dict[str, int]:
        """Of the phase that holds the most."""
        return self.phases[self.worst]

    @property
    def worst(self) -> str:
        """The phase that holds the most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak.values())


def rehearse(config: Config, batch: PairBatch, *, accumulates: bool, gpu: bool) -> Rehearsed:
    """A step over ``batch`` as the last of its micro-batches, on the CPU or on a GPU.

    ``accumulates``: gradients of earlier micro-batches are there already. ``config`` is resolved:
    its dtype is one, and gradient_checkpointing is no `auto`. Raises ValueError for a model that
    fastpref refuses; whatever torch raises where its ops cannot run without numbers.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
    live = LiveBytes(_head_ops(gpu), {torch.ops.aten._grouped_mm.default: _grouped_mm})
    with torch.device("meta"), _quiet():
        model = skeleton(config)
        if config.trainable == "head":
            model = freeze_body(model)
    with fake, live, _quiet():
        with live.made("weights"):
            _without_memory(model.module)
        if gpu and config.attn_implementation != "sdpa" and not model.lacks([FLASH]):
            model = dataclasses.replace(model, attention=FLASH)
        trained = model.trained
        hooks = [p.register_post_accumulate_grad_hook(_marker(live)) for p in trained]
        with live.made("optimizer"):
            step, extra = _optimizer(config, model)
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            step()  # makes its state
        live.now["optimizer"] = live.now.get("optimizer", 0) + extra
        _clear(trained)
        if accumulates:
            with live.made("gradients"):
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
        live.restart()
        _step(model, config, _fake(fake, batch, model, config))
        phases = {"forward and backward": live.peak}
        live.restart()
        with live.made("optimizer"):
            step()
        phases["optimizer"] = live.peak
        sizes = {name: own.get("weights", 0) for name, own in phases.items()}
        learning = sum(p.numel() * p.element_size() for p in trained)
        for own in phases.values():
            if config.sync_ref_model:
                own["reference"] = own["weights"]
            if tracks(config):
                own["track"] = _track_bytes(model, config, batch, learning)
        # Gradients of separate sequences, their sum, and those of the packed ones.
        phases["self-check"] = {"weights": sizes["optimizer"], "gradients": 3 * learning}
        del step
        _clear(trained)
        for hook in hooks:
            hook.remove()
        counts = [sum(map(numbers, own)) for own in (model.module.parameters(), trained)]
    if config.ref_model_name_or_path and not config.sync_ref_model:
        phases["reference log-probs"] = {
            "weights": phases["self-check"]["weights"],
            "reference": _reference_bytes(config),
        }
    return Rehearsed(phases, *counts)


def tracks(config: Config) -> bool:
    """Whether taps watch the steps."""
    return config.record and config.track in ("sketch", "exact")


def _track_bytes(model: PairModel, config: Config, batch: PairBatch, learning: int) -> int:
    """What taps hold beside a step, at most (docs/taps.md): gradients of the outputs of layers with
    one input; without C k numbers a token of one layer, and those in blocks; sketches of a step and
    of its micro-batch. With `exact`: a padded block of rows of the widest layers, and the copy of
    the trained weights that rates compare with."""
    linear = [m.weight.shape for m in model.module.modules() if isinstance(m, nn.Linear)]
    k, tokens, pairs = config.sketch_dim, batch.num_tokens, batch.num_pairs
    layers = sum(1 for _ in decoder_layers(model.module)) or 1
    widest = max(max(shape) for shape in linear) if linear else 1
    dim = model.head.weight.shape[1]
    numbers = 2.0 * tokens * widest
    numbers += 2 * (2 + MAX_PADDING) * tokens * k
    numbers += k * k * (2 * layers + 3) * (config.train_batch_size + 2 * pairs)
    if config.track == "exact":
        longest = max(map(sum, batch.lengths))
        numbers += MAX_PADDING * tokens * (dim + widest) + 2 * min(ENTRIES, pairs * longest**2)
    copy = learning if config.track == "exact" and config.rate_every else 0
    return round(4 * numbers) + copy


def _reference_bytes(config: Config) -> int:
    """Of the weights of another model as the reference, which is here beside the policy."""
    with torch.device("meta"), _quiet():
        module = reference_skeleton(config).module
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _without_memory(module: nn.Module) -> None:
    """Fake tensors of the CPU in the place of those on torch's meta device, which some ops refuse;
    what several modules share stays shared."""
    made: dict[int, Tensor] = {}
    for layer in module.modules():
        for own in (layer._parameters, layer._buffers):
            for name, old in own.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty_like(old, device="cpu")
                    learns = old.requires_grad
                    made[id(old)] = (
                        nn.Parameter(new, learns) if isinstance(old, nn.Parameter) else new
                    )
                own[name] = made[id(old)]  # type: ignore[assignment]


def _clear(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _marker(live: LiveBytes) -> Any:
    def mark(parameter: Tensor) -> None:
        assert parameter.grad is not None
        live.mark([parameter.grad], "gradients")

    return mark


def _step(model: PairModel, config: Config, batch: PairBatch) -> None:
    """Forward and backward as `fastpref.step.backward` has them."""
    norms = HeadNorms() if config.record and config.track != "none" else None
    with model.dropout():
        head, load = model.routed_logp(batch, norms, wanted_stats(config))
        slope = torch.ones_like(head.logp)
        if load is None:
            head.logp.backward(slope)
        else:
            assert model.router
            uneven = model.router.loss(load, model.router.balance(load.packed()))
            torch.autograd.backward((head.logp, uneven), (slope, None))


def _fake(fake: Any, batch: PairBatch, model: PairModel, config: Config) -> PairBatch:
    """The batch without numbers; with states in the place of tokens where the head alone learns."""
    moved: dict[str, Any] = {
        spec.name: fake.from_tensor(value)
        for spec in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, spec.name), Tensor)
    }
    batch = dataclasses.replace(batch, **moved)
    if not model.frozen_body:
        return batch
    count, dim = batch.num_tokens, model.head.weight.shape[1]
    hidden = torch.empty(count, dim, dtype=model.head.weight.dtype)
    empty = batch.tokens[:0]
    return dataclasses.replace(batch, hidden=hidden, tokens=empty, positions=empty)


def _optimizer(config: Config, model: PairModel) -> tuple[Any, int]:
    """What takes the optimizer's step, and the bytes of state that it does not make itself."""
    if config.optim not in EIGHT_BIT:
        return _unfused(make_optimizer(config, model)[0]), 0
    # bitsandbytes' kernels take addresses: plain SGD in their place, and their state by its rule.
    plain = dataclasses.replace(config, optim="sgd", optim_args=())
    step = _unfused(make_optimizer(plain, model)[0])
    if config.optim.startswith("paged"):
        return step, 0  # lies on the host where the device is full
    state = 0
    for parameter in model.trained:
        count = parameter.numel()
        small = count < LEAST_8BIT
        state += 8 * count if small else 2 * (count + 4 * -(-count // BLOCK_8BIT))
    return step, state


def _unfused(optimizer: torch.optim.Optimizer) -> Any:
    """Its step; without SGD's fused kernel, which fake tensors have not."""
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            group["fused"] = group["foreach"] = False
    return optimizer.step


def _head_ops(gpu: bool) -> dict[Any, tuple[str, Scratch]]:
    """What the two ops of the head hold while they run, beside their results: a tile of float32
    logits; of half types, states, their gradient and a tile of the weight and its gradient in
    float32, of which a GPU's products need less (kernels/README.md)."""

    def forward(args: tuple[Any, ...]) -> int:
        hidden, weight, plan = args[0], args[1], Plan(*args[7])
        (rows, dim), half = hidden.shape, hidden.dtype.itemsize < 4
        wide = 4 if half else hidden.dtype.itemsize
        whole = not half and plan.kept * plan.width >= weight.shape[0]
        numbers = 0 if whole else plan.width * rows
        in_c = wide == 4 and _native.library() is not None
        if not gpu and (plan.group_size or ("entropy" in args[8] and not in_c)):
            numbers += plan.width * rows  # a tile's columns in order, or its logarithms
        if half and not gpu:
            numbers += (plan.width + rows) * dim
        if plan.need_hidden and not whole:
            numbers += rows * dim
        return wide * (numbers + _gram_numbers(plan, args[10] if len(args) > 10 else None))

    def backward(args: tuple[Any, ...]) -> int:
        hidden, plan = args[1], Plan(*args[-1])
        (rows, dim), half = hidden.shape, hidden.dtype.itemsize < 4
        if not half:
            return 0
        numbers = rows * dim  # the gradient before it is rounded
        if plan.need_weight:
            numbers += rows * dim + plan.width * (dim + (0 if gpu else rows))
        return 4 * numbers

    ops = torch.ops.fastpref
    return {
        ops.linear_logprob_forward.default: ("head", forward),
        ops.linear_logprob_backward.default: ("head", backward),
    }


def _grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """What torch's products of experts give, of which fake tensors know those in bfloat16 alone:
    (T, K) x (E, K, N), or the gradient of the latter, (K, T) x (T, N)."""
    if a.ndim == b.ndim == 2:
        assert offs is not None
        return a.new_empty((len(offs), a.shape[0], b.shape[1]), dtype=out_dtype or a.dtype)
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=out_dtype or a.dtype)


def _gram_numbers(plan: Plan, counts: Sequence[int] | None) -> int:
    """Of the head's exact norms: products of all rows of a pair with each other, seven arrays of
    them at the end."""
    if not plan.group_size or not counts:
        return 0
    size = plan.group_size
    pairs = (sum(counts[i : i + size]) for i in range(0, len(counts), size))
    return 7 * sum(length * length for length in pairs)


@contextmanager
def _quiet() -> Iterator[None]:
    """What would be logged here, some of it once only, is left for the run itself to say."""
    loggers = [logging.getLogger(name) for name in ("fastpref", "fastpref_kernels")]
    before, said = [logger.level for logger in loggers], set(_launch._said)
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        _launch._said.intersection_update(said)
