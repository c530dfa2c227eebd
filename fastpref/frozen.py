"""The frozen features of preference pairs, as `fastpref.theory` takes them, from any model.

A pair's feature is the final hidden state, after the final norm once, at the last token of its
prefix: there the model predicts the first token in which the two completions differ. One packed
pass computes the prefixes alone, every distinct one once, and the start that two of them have in
common (a system prompt, the frame around a statement) once for both.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastpref.batch import GROUP
from fastpref.config import Config
from fastpref.data.dataset import Dataset
from fastpref.data.pack import (
    common_length,
    demand_vocabulary,
    fed_tokens,
    pack_pairs,
    plan_microbatches,
)
from fastpref.data.tokenize import TokenPair
from fastpref.model import PairModel
from fastpref.selfcheck import TOLERANCE
from fastpref.theory.pairs import FrozenPairs, frozen_pairs

CHECKED = 4  # prefixes that are computed the plain way too
WORTH_SHARING = 8  # two prompts are computed as one where they share an eighth of it
OFFICIAL_EPSILON = 1e-5  # of the norm that the paper's code applies once more


@dataclass(frozen=True)
class FirstTokens:
    """Pairs cut to the first token in which their completions differ, and what that left out."""

    pairs: list[TokenPair]  # the prefix as prompt, completions of one token each
    shared_start: int  # of these pairs, those whose completions begin with the same token
    longer: int  # those with a completion that goes on behind its first differing token
    ended: int  # of the longer ones, those that go on by the EOS token alone
    without: list[TokenPair]  # pairs, whole, that have no such token: nothing is known of them


def first_tokens(pairs: Sequence[TokenPair], eos_token_id: int | None = None) -> FirstTokens:
    """Cut every pair to where its completions part.

    A pair has no such place where one completion begins with the whole other one; nor where the
    prefix is empty, since nothing predicts a first token.
    """
    cut, without = [], []
    shared_start = longer = ended = 0
    for pair in pairs:
        common = common_length(pair.chosen, pair.rejected)
        rests = pair.chosen[common:], pair.rejected[common:]
        if not all(map(len, rests)) or len(pair.prompt) + common == 0:
            without.append(pair)
            continue
        prefix = np.concatenate([pair.prompt, pair.chosen[:common]])
        cut.append(replace(pair, prompt=prefix, chosen=rests[0][:1], rejected=rests[1][:1]))
        shared_start += common > 0
        longer += max(map(len, rests)) > 1
        ended += all(len(rest) == 2 and rest[1] == eos_token_id for rest in rests)
    return FirstTokens(cut, shared_start, longer, ended, without)


@dataclass(frozen=True)
class Frozen:
    """Pairs of a data set as `fastpref.theory` takes them."""

    pairs: FrozenPairs  # those of `firsts`, in their order
    ids: np.ndarray  # (P,) their pair_id
    firsts: FirstTokens


def demand_head(model: PairModel) -> None:
    """Raise ValueError for a model that cannot score tokens."""
    if model.module.get_output_embeddings() is None:  # type: ignore[operator]
        raise ValueError(
            f"{type(model.module).__name__} has no output head, so no token has a log-probability "
            "and there is nothing that preference pairs could teach. Name a causal language model."
        )


def freeze(
    model: PairModel,
    dataset: Dataset,
    side: Sequence[TokenPair],  # of `dataset`: its training or its held-out pairs
    config: Config,
    *,
    weigh: bool = False,
    double_norm: bool = False,
    progress: bool = False,
) -> Frozen:
    """The pairs of ``side`` with the features that ``model`` gives them.

    ``weigh``: a pair counts as often as `dataset_weights` says. Raises ValueError where the model
    or the data allow no prediction: pairs without a first differing token (unless ``on_bad_rows``
    is drop), features that are not finite, a model that packing gets wrong.
    """
    firsts = first_tokens(side, model.tokenizer.eos_token_id)
    _demand_answers(firsts, dataset, config)
    pairs = firsts.pairs
    demand_vocabulary(pairs, len(model.head.weight))
    check_features(model, pairs)
    budget = config.max_tokens_per_microbatch
    features = prefix_features(
        model, pairs, max_tokens=budget, double_norm=double_norm, progress=progress
    )
    _demand_finite(model, features, pairs, dataset, budget)
    kept, behavior = np.unique([pair.behavior for pair in pairs], return_inverse=True)
    frozen = frozen_pairs(
        features,
        np.array([pair.chosen[0] for pair in pairs]),
        np.array([pair.rejected[0] for pair in pairs]),
        behavior,
        [dataset.behaviors[k] for k in kept],
        _counts(pairs, config.dataset_weights) if weigh else None,
    )
    return Frozen(frozen, np.array([pair.pair_id for pair in pairs]), firsts)


def _counts(pairs: Sequence[TokenPair], weights: Sequence[float]) -> np.ndarray | None:
    """(P,) times that an epoch takes each pair; None: all alike."""
    if len(set(weights)) < 2:
        return None
    return np.array([weights[pair.origin] for pair in pairs])


def _demand_answers(firsts: FirstTokens, dataset: Dataset, config: Config) -> None:
    """Pairs without a first differing token are bad rows."""
    if not firsts.without or (firsts.pairs and config.on_bad_rows == "drop"):
        return
    example = firsts.without[0]
    lengths = f"{len(example.chosen)} and {len(example.rejected)} tokens"
    raise ValueError(
        f"{len(firsts.without)} pairs have no first token in which their answers differ, the first "
        f"being {_places(dataset)[example.pair_id]} ({lengths}): one answer begins with the whole "
        "other one, or nothing precedes the answers. Set --append_eos true or a larger "
        "--max_length, or --on_bad_rows drop to leave them out."
    )


def _demand_finite(
    model: PairModel,
    features: np.ndarray,
    pairs: Sequence[TokenPair],
    dataset: Dataset,
    max_tokens: int,
) -> None:
    bad = first_not_finite(model, pairs, features, max_tokens=max_tokens)
    if bad is not None:
        values = features[bad][~np.isfinite(features[bad])]
        number = int((~np.isfinite(features).all(axis=1)).sum())
        raise ValueError(
            f"{_places(dataset)[pairs[bad].pair_id]} (behavior "
            f"{dataset.behaviors[pairs[bad].behavior]!r}): the model's hidden state at the last "
            f"token before the answers holds {values[0]}; all in all {number} of {len(pairs)} pairs"
            ", or their neighbours in a batch, are not finite. The weights are damaged, or the "
            "precision is too low (--dtype float32)."
        )


def _places(dataset: Dataset) -> dict[int, str]:
    """File and line of every pair, by its id."""
    return {int(str(row["pair_id"])): f"{row['file']}:{row['line']}" for row in dataset.index}


@torch.inference_mode()
def prefix_features(
    model: PairModel,
    pairs: Sequence[TokenPair],  # of `FirstTokens`
    *,
    max_tokens: int,
    double_norm: bool = False,
    progress: bool = False,
) -> np.ndarray:
    """(P, D) float64 features, times the model's logit scale; nothing is said of their values.

    ``max_tokens``: packed tokens per forward. ``double_norm``: the final norm is applied once more,
    as the paper's code does. Raises ValueError for a prefix longer than ``max_tokens``, and with
    ``double_norm`` for a model whose last module is no norm.
    """
    again = _norm_again(model, pairs[0]) if double_norm else None
    places: dict[bytes, list[int]] = defaultdict(list)
    for place, pair in enumerate(pairs):
        places[pair.prompt.astype(">i4").tobytes()].append(place)
    same = [places[key] for key in sorted(places)]  # ordered by tokens
    couples = list(_couples([pairs[own[0]] for own in same], max_tokens))
    fed = fed_tokens([couple for couple, *_ in couples])
    features = np.empty((len(pairs), model.head.weight.shape[1]))
    bar = tqdm(total=len(same), unit="prefix", desc="features", disable=not progress)
    with bar:
        for batch in plan_microbatches(fed, np.arange(len(couples)), max_tokens):
            states = _last_states(model, [couples[i][0] for i in batch])
            states = states if again is None else again(states)
            scaled = states.double().cpu().numpy() * model.head.logit_scale
            owners = [own for i in batch for own in couples[i][1:]]
            for own, state in zip(owners, scaled, strict=True):
                features[same[own]] = state
            bar.update(len(set(owners)))
    return features


def _couples(
    pairs: Sequence[TokenPair],  # distinct prompts, ordered by their tokens
    max_tokens: int,
) -> Iterator[tuple[TokenPair, int, int]]:
    """Two prompts each as the completions of a pair whose prompt is their common start, and which
    two; a prompt that has no neighbour worth it by itself, twice the same number.

    Neighbours in the order of tokens have the longest common starts. Attention looks at a couple's
    whole length at once, so a short common start is not worth the longer block.
    """
    here = 0
    while here < len(pairs):
        prompt = pairs[here].prompt
        after = pairs[here + 1].prompt if here + 1 < len(pairs) else prompt[:0]
        common = common_length(prompt, after)
        fed = len(prompt) + len(after) - common
        if common * WORTH_SHARING < fed or fed > max_tokens:
            yield _ending(pairs[here], prompt, prompt[:0], prompt[:0]), here, here
            here += 1
        else:
            rests = prompt[common:], after[common:]
            yield _ending(pairs[here], prompt[:common], *rests), here, here + 1
            here += 2


def _ending(
    pair: TokenPair, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray
) -> TokenPair:
    """A pair of which exactly these tokens are fed: what they predict is no token, and unlike."""
    ends = (np.append(chosen, -1), np.append(rejected, -2))
    return replace(pair, prompt=prompt, chosen=ends[0], rejected=ends[1])


def first_not_finite(
    model: PairModel, pairs: Sequence[TokenPair], features: np.ndarray, *, max_tokens: int
) -> int | None:
    """Which pair's feature is not finite by itself, the first one; None where all are finite.

    Attention weighs what it must not see by 0, and 0 times nan is nan: in a packed batch one such
    prompt makes others nan too, so the suspects are computed one by one.
    """
    suspects = np.flatnonzero(~np.isfinite(features).all(axis=1)).tolist()
    for i in suspects:
        if not np.isfinite(prefix_features(model, [pairs[i]], max_tokens=max_tokens)).all():
            return int(i)
    return int(suspects[0]) if suspects else None


@torch.inference_mode()
def check_features(model: PairModel, pairs: Sequence[TokenPair]) -> float:
    """Compare what packed features say with the model's own logits on a few prefixes.

    Returns the largest difference relative to the logits' root mean square. Raises ValueError
    naming the architecture where packing gets it wrong, or where its logits are not finite.
    """
    name = type(model.module).__name__
    by_length = np.argsort([len(pair.prompt) for pair in pairs], kind="stable")
    picked = np.linspace(0, len(pairs) - 1, min(CHECKED, len(pairs))).round().astype(int)
    chosen = [pairs[i] for i in by_length[picked]]
    try:
        ours = _logits(
            model, prefix_features(model, chosen, max_tokens=int(fed_tokens(chosen).sum()))
        )
        with model.plain_attention(), model.autocast():
            plain = [
                model.module(input_ids=_ids(pair, model.device)[None], use_cache=False).logits[0]
                for pair in chosen
            ]
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name} is not supported: it cannot compute a packed batch in {model.dtype}: {error}"
        ) from error
    worst = 0.0
    for own, other in zip(ours, plain, strict=True):
        logits = other[-1].double()
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(
                f"{name}: the model's own logits are not finite in {model.dtype}. Its weights are "
                "damaged, or the precision is too low (--dtype float32)."
            )
        worst = max(worst, float((own - logits).norm() / logits.norm().clamp_min(1e-30)))
    if not worst <= TOLERANCE[model.dtype]:
        raise ValueError(
            f"{name} (model_type {model.module.config.model_type}) is not supported: the head on "  # type: ignore[union-attr]
            f"packed hidden states gives logits that differ from the model's own by {worst:.2g} of "
            f"their size, where rounding in {model.dtype} explains {TOLERANCE[model.dtype]:g}."
        )
    return worst


def _last_states(model: PairModel, pairs: Sequence[TokenPair]) -> Tensor:
    """(2P, D) hidden states that predict the last tokens of chosen and rejected, pair by pair."""
    batch = pack_pairs(pairs)
    ends = np.bincount(batch.segment_id.numpy(), minlength=batch.num_segments).cumsum() - 1
    rows = batch.rows[torch.from_numpy(ends.reshape(-1, GROUP)[:, 1:].ravel())]
    return model.hidden(batch.to(model.device)).index_select(0, rows.to(model.device))


def _ids(pair: TokenPair, device: torch.device) -> Tensor:
    return torch.from_numpy(pair.prompt.astype(np.int64)).to(device)


def _logits(model: PairModel, features: np.ndarray) -> Tensor:
    """(P, V) float64, from features by the head as `PairModel.head` describes it."""
    head = model.head
    logits = torch.from_numpy(features).to(model.device) @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias * head.logit_scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def _norm_again(model: PairModel, pair: TokenPair) -> Callable[[Tensor], Tensor]:
    """The final norm with the epsilon of the paper's code; it is found by what it returns."""
    made: list[tuple[nn.Module, Tensor]] = []

    def keep(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor):
            made.append((module, output))

    body = model.module.base_model
    leaves = [m for m in body.modules() if not any(m.children())]  # type: ignore[union-attr]
    hooks = [leaf.register_forward_hook(keep) for leaf in leaves]
    try:
        last = model.hidden(pack_pairs([pair]).to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    found = [
        m for m, out in made if (out.data_ptr(), out.numel()) == (last.data_ptr(), last.numel())
    ]
    if not found or "norm" not in type(found[-1]).__name__.lower():
        raise ValueError(
            f"double_norm: {type(model.module).__name__} does not end in a norm that could be "
            "applied once more. Leave --compat out."
        )
    own = copy.copy(found[-1])  # shares the weights, not the epsilon
    for name in ("variance_epsilon", "eps"):
        if hasattr(own, name):
            setattr(own, name, OFFICIAL_EPSILON)
    return own
