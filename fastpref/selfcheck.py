"""Before a run: is the packed, prefix-shared computation this model's own? Measured, not assumed.

Of the architectures in transformers many never call its attention interface, or do something along
the sequence that packing breaks. So one packed batch of mixed lengths is compared with plain
forwards and backwards of the separate sequences, log-probs and every gradient. What differs is
refused, with the cause where `fastpref.diagnosis` finds it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpref import last_block
from fastpref.attention_backends import SDPA
from fastpref.data.branches import Probe, fed_lengths, pack_probes, plan_probes
from fastpref.data.pack import fed_tokens, pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.diagnosis import find_cause, out_of_memory
from fastpref.model import PairModel
from fastpref.quantised import computing_in
from fastpref.router import Router

log = logging.getLogger(__name__)

# Largest accepted difference, relative to the root mean square of the plain values. What packing
# gets wrong changes tenths; rounding in the precision of the products changes this much at most.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3, torch.bfloat16: 1e-1}
# Mixtures of experts in float32: a token at a tie between two experts may be routed either way.
EXPERTS_TOLERANCE = 2e-2
PAIRS = 4

Compared = tuple[Tensor, dict[str, Tensor]]  # (P, 2) log-probs; gradients by name


def check_model(
    model: PairModel, pairs: Sequence[TokenPair], max_tokens: int | None = None
) -> float:
    """Compare packed with plain on a few of ``pairs``; returns the largest relative difference.

    In float32 where ``model`` computes in less: a mistake then shows above the rounding.
    ``max_tokens``, a run's `max_tokens_per_microbatch`, bounds the packed tokens of the comparison
    (one pair is always taken), half of it in float32. Raises ValueError naming the architecture,
    what differs and the cause where it is known.
    """
    exact = _exact(model)
    with computing_in(model.module, exact.dtype):
        return _check_model(model, exact, pairs, max_tokens)


def _check_model(
    model: PairModel, exact: PairModel, pairs: Sequence[TokenPair], max_tokens: int | None
) -> float:
    if max_tokens is not None and exact.dtype is not model.dtype:
        max_tokens //= 2
    compared = _compared_pairs(pairs, max_tokens)
    name = f"{type(model.module).__name__} (model_type {model.module.config.model_type})"  # type: ignore[union-attr]
    plain = _computing(exact, _plain, compared, f"{name} cannot compute")
    if not all(bool(torch.isfinite(x).all()) for x in (plain[0], *plain[1].values())):
        raise ValueError(
            f"{name}: the model's own log-probabilities or gradients are not finite in "
            f"{exact.dtype}. Its weights are damaged, or the precision is too low."
        )
    refusal = f"{name} is not supported: it cannot compute a packed batch"
    accepted, narrow = _accepted(exact), bool(last_block.narrowed(model.module))
    try:
        worst, what = _apart(_computing(exact, _packed, compared, refusal), plain)
    except ValueError:
        if not narrow:
            raise
        worst, what = math.nan, ""
    if narrow and (not worst <= accepted or _runs_again(exact, compared)):
        last_block.widen(model.module)
        worst, what = _apart(_computing(exact, _packed, compared, refusal), plain)
        if worst <= accepted:
            log.warning(
                "%s: behind its attention the last block is not what fastpref knows, so it is "
                "computed for every token, not for those alone that predict a scored one",
                name,
            )
    if not worst <= accepted:
        raise ValueError(
            f"{name} is not supported: packed and separate computation differ in {what} by "
            f"{worst:.2g} of its size, where rounding in {exact.dtype} explains {accepted:g}. "
            f"Cause: {find_cause(exact, compared[0])}."
        )
    if model.dtype is not exact.dtype:
        _demand_finite(model, compared, name)
    if model.attention != SDPA:
        _demand_attention(model, compared, name)
    if exact.router:
        _demand_balance(exact, exact.router, compared, name)
    return worst


@torch.no_grad()
def check_probes(model: PairModel, probes: Sequence[Probe], max_tokens: int) -> float:
    """Compare log-probs of packed probes, the prompt shared, with plain forwards; as `check_model`.

    Of the prompt with the most responses, and of the longest probe.
    """
    exact = _exact(model)
    groups = [group for own in plan_probes(probes, max_tokens) for group in own]
    longest = max(groups, key=lambda own: max(sum(fed_lengths([probes[i]])) for i in own))
    most = max(groups, key=len)
    chosen = [[probes[i] for i in own] for own in ([most] if most == longest else [most, longest])]
    packed = torch.cat([exact.logp(pack_probes([own]).to(exact.device)).logp for own in chosen])
    with exact.plain_attention():
        plain = torch.stack(
            [_sequence_logp(exact, p.prompt, p.response) for own in chosen for p in own]
        )
    worst, accepted = _difference(packed, plain), _accepted(exact)
    if not worst <= accepted:
        raise ValueError(
            f"{type(model.module).__name__}: log-probabilities of probes that share their prompt "
            f"differ from those of separate sequences by {worst:.2g} of their size, where rounding "
            f"in {exact.dtype} explains {accepted:g}. Set probe_every: 0 to train without probes."
        )
    return worst


def _compared_pairs(pairs: Sequence[TokenPair], max_tokens: int | None) -> list[TokenPair]:
    """The longest, the shortest and two between, as many as ``max_tokens`` holds."""
    fed = fed_tokens(pairs)
    by_length = np.argsort(fed, kind="stable")
    places = np.linspace(0, len(pairs) - 1, min(PAIRS, len(pairs))).round().astype(int)
    longest, *others = by_length[places[::-1]].tolist()
    taken, total = [longest], int(fed[longest])
    for i in [*others[-1:], *others[:-1]]:
        if max_tokens is None or total + int(fed[i]) <= max_tokens:
            taken.append(i)
            total += int(fed[i])
    return [pairs[i] for i in taken]


def _exact(model: PairModel) -> PairModel:
    """``model`` in the highest precision that its weights have, with attention that takes it."""
    model = dataclasses.replace(model, attention=SDPA)
    kinds = {p.dtype for p in model.module.parameters() if p.is_floating_point()}
    lowest = min(kinds, key=lambda d: torch.finfo(d).bits)
    if model.dtype is lowest or torch.finfo(lowest).bits < torch.finfo(torch.float32).bits:
        return model
    return dataclasses.replace(model, dtype=lowest)


def _accepted(model: PairModel) -> float:
    text = model.module.config.get_text_config(decoder=True).to_dict()  # type: ignore[union-attr,operator]
    if model.dtype is torch.float32 and any("expert" in key and text[key] for key in text):
        return EXPERTS_TOLERANCE
    return TOLERANCE[model.dtype]


def _apart(packed: Compared, plain: Compared) -> tuple[float, str]:
    """The largest difference, and what differs."""
    worst, what = _difference(packed[0], plain[0]), "log-probabilities"
    # Some gradients are zero but for rounding (a key's bias without rotary embedding): they are
    # held against a thousandth of what the others are.
    floor = 1e-3 * max(map(_size, plain[1].values()), default=0.0)
    for parameter, gradient in plain[1].items():
        difference = _difference(packed[1][parameter], gradient, floor)
        if not difference <= worst:
            worst, what = difference, f"the gradient of {parameter}"
    return worst, what


def _computing(
    model: PairModel,
    compute: Callable[[PairModel, Sequence[TokenPair]], Compared],
    pairs: Sequence[TokenPair],
    refusal: str,
) -> Compared:
    """``compute(model, pairs)``, with whatever a model's code may raise as a ValueError."""
    try:
        return compute(model, pairs)
    except Exception as error:
        if out_of_memory(error):
            raise ValueError(
                f"the self-check of {type(model.module).__name__} ran out of memory on "
                f"{model.device}: {error} Set max_tokens_per_microbatch or max_length lower."
            ) from error
        raise ValueError(f"{refusal} in {model.dtype}: {error}") from error


def _packed(model: PairModel, pairs: Sequence[TokenPair]) -> Compared:
    logp = _packed_logp(model, pairs)
    weight = _weights(pairs).to(logp)
    return logp.detach(), _gradients(model, (weight * logp).sum())


@torch.no_grad()
def _runs_again(model: PairModel, pairs: Sequence[TokenPair]) -> bool:
    """Whether a narrowed layer runs more than once in a forward, so that what it gives a token is
    read by others. In bfloat16 the difference may be less than rounding explains."""
    runs: Counter[nn.Module] = Counter()
    layers = last_block.narrowed(model.module)
    hooks = [x.register_forward_pre_hook(lambda layer, _: runs.update([layer])) for x in layers]
    try:
        _packed_logp(model, pairs)
    finally:
        for hook in hooks:
            hook.remove()
    return max(runs.values(), default=0) > 1


def _packed_logp(model: PairModel, pairs: Sequence[TokenPair]) -> Tensor:  # (P, 2)
    batch = pack_pairs(pairs).to(model.device)
    shared, chosen, rejected = model.logp(batch).logp.view(-1, 3).unbind(1)
    return torch.stack([shared + chosen, shared + rejected], dim=1)


def _plain(model: PairModel, pairs: Sequence[TokenPair]) -> Compared:
    """transformers' own forward of each sequence by itself, log-softmax over all its logits."""
    sequences = [(p.prompt, y) for p in pairs for y in (p.chosen, p.rejected)]
    found, total = [], dict[str, Tensor]()
    with model.plain_attention():
        for sequence, weight in zip(sequences, _weights(pairs).flatten().tolist(), strict=True):
            logp = _sequence_logp(model, *sequence)
            found.append(logp.detach())
            for name, grad in _gradients(model, weight * logp).items():
                total[name] = total[name].add_(grad) if name in total else grad
    return torch.stack(found).view(-1, 2), total


def _sequence_logp(model: PairModel, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64)).to(model.device)
    with model.autocast():
        logits = model.module(input_ids=ids[None], use_cache=False).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    first = max(len(prompt), 1)  # nothing predicts position 0
    return -F.cross_entropy(logits[first - 1 : -1], ids[first:], reduction="sum")


def _weights(pairs: Sequence[TokenPair]) -> Tensor:  # (P, 2)
    """Of the sum of log-probs whose gradient is compared: of changing sign and size, so that it
    tells the sequences apart."""
    return torch.linspace(1.0, -2.0, 2 * len(pairs)).view(-1, 2)


def _gradients(model: PairModel, scalar: Tensor) -> dict[str, Tensor]:
    named = [(n, p) for n, p in model.module.named_parameters() if p.requires_grad]
    if not named:  # a reference: its values are all that is wanted
        return {}
    grads = torch.autograd.grad(scalar, [p for _, p in named], allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(named, grads, strict=True)
    }


@torch.no_grad()
def _demand_balance(
    model: PairModel, router: Router, pairs: Sequence[TokenPair], name: str
) -> None:
    """The load-balancing loss of the packed pairs is transformers' own of the sequences."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    remedy = "Set router_aux_loss_coef: 0 to train without that loss."
    try:
        whole = pack_pairs(pairs, whole=True).to(model.device)
        ours = float(router.balance(model.load(whole)).value)
        with model.plain_attention(), model.autocast():
            logits = [
                model.module.base_model(  # type: ignore[operator]
                    input_ids=torch.from_numpy(np.r_[p.prompt, y].astype(np.int64))[None].to(
                        model.device
                    ),
                    output_router_logits=True,
                    use_cache=False,
                ).router_logits
                for p in pairs
                for y in (p.chosen, p.rejected)
            ]
        layers = tuple(torch.cat(layer) for layer in zip(*logits, strict=True))
        plain = float(load_balancing_loss_func(layers, router.experts, router.top_k))
    except Exception as error:
        raise ValueError(
            f"{name}: the load-balancing loss of its routers (router_aux_loss_coef={router.coef}) "
            f"cannot be computed: {error}. {remedy}"
        ) from error
    if not abs(ours - plain) <= _accepted(model) * plain:
        raise ValueError(
            f"{name}: the load-balancing loss of its routers (router_aux_loss_coef={router.coef}) "
            f"comes out as {ours:.6g} where transformers has {plain:.6g}. {remedy}"
        )


@torch.no_grad()
def _demand_finite(model: PairModel, pairs: Sequence[TokenPair], name: str) -> None:
    if not bool(torch.isfinite(_packed_logp(model, pairs)).all()):
        raise ValueError(
            f"{name}: its log-probabilities are not finite in {model.dtype}, though they are in "
            "float32. Set dtype: float32."
        )


def _demand_attention(model: PairModel, pairs: Sequence[TokenPair], name: str) -> None:
    """The run's attention backend gives what dense blocks give, in the run's own precision."""
    backend = model.attention.name
    refusal = f"{name}: attn_implementation: {backend}, unlike sdpa, cannot compute a packed batch"
    logp, grads = _computing(model, _packed, pairs, refusal)
    dense = dataclasses.replace(model, attention=SDPA)
    dense_logp, dense_grads = _packed(dense, pairs)
    floor = 1e-3 * max(map(_size, dense_grads.values()), default=0.0)
    found = {"log-probabilities": _difference(logp, dense_logp)} | {
        f"the gradient of {parameter}": _difference(grads[parameter], dense_grad, floor)
        for parameter, dense_grad in dense_grads.items()
    }
    for what, difference in found.items():
        if not difference <= _accepted(model):
            raise ValueError(
                f"{name}: attn_implementation: {backend} and sdpa differ in {what} by "
                f"{difference:.2g} of its size, where rounding in {model.dtype} explains "
                f"{_accepted(model):g}. Set attn_implementation: sdpa."
            )


def _difference(ours: Tensor, plain: Tensor, floor: float = 0.0) -> float:
    """Root-mean-square difference over root-mean-square value; nan where either is not finite."""
    return _size(ours.double() - plain.double()) / max(_size(plain), floor, 1e-30)


def _size(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
