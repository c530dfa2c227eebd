"""Norms and sketches of whole models: the sum of parts against one naive backward per pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from fastpref_kernels import linear_norms, tied_norms, unique_ids, weight_sketch
from torch import Tensor, nn

from fastpref import loading
from fastpref.data.pack import pack_pairs
from fastpref.data.tokenize import TokenPair
from fastpref.model import PairModel
from tests.kernels.captures import Capture, capture, parameter_norms, parameter_sketches

V = 61
NAMES = ["gpt2", "llama", "qwen3", "gemma3"]


def build(name: str) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": V, "bos_token_id": None, "eos_token_id": None}
    own = {**shape, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    own |= {"num_key_value_heads": 2, "intermediate_size": 40, "initializer_range": 0.2}
    if name == "gpt2":  # LayerNorm, Conv1D, biases, learned positions, tied
        config = hf.GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=160, **shape)
        model = hf.GPT2LMHeadModel(config)
    elif name == "llama":  # not tied
        model = hf.LlamaForCausalLM(hf.LlamaConfig(attention_bias=True, **own))
    elif name == "qwen3":  # a norm shared by heads, tied
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(head_dim=8, tie_word_embeddings=True, **own))
    else:  # 1 + w, a scaled embedding, windows, tied
        more = {"head_dim": 8, "sliding_window": 5, "tie_word_embeddings": True}
        more["layer_types"] = ["sliding_attention", "full_attention"]
        model = hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**own, **more))
    with torch.no_grad():
        for parameter in model.parameters():  # no weight at the value it starts from
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.double().eval()


def token_pair(
    n: int, prompt: int, common: int, chosen: int, rejected: int, ids: int = 9
) -> TokenPair:
    rng = np.random.default_rng(n)
    start = rng.integers(0, ids, common)  # few ids: most of them stand several times
    rest = [rng.integers(0, 9, k) for k in (chosen, rejected)]
    if chosen and rejected:
        rest[1][0] = (rest[0][0] + 1) % 9
    texts = [rng.integers(0, 9, prompt), np.r_[start, rest[0]], np.r_[start, rest[1]]]
    return TokenPair(n, 0, "", *(x.astype(np.int32) for x in texts), truncated=False)


# One token each; long common starts with one token of difference, whose gradients cancel; a
# completion that begins the other.
PAIRS = [
    token_pair(0, 9, 0, 1, 1),
    token_pair(1, 3, 4, 6, 2),
    token_pair(2, 2, 150, 1, 1, ids=2),
    token_pair(3, 5, 3, 0, 2),
    token_pair(4, 1, 0, 12, 5),
]
P = len(PAIRS)
PAIR_ARGUMENTS = {"num_segments": P}


def logp(model: Any, pair: TokenPair, completion: np.ndarray) -> Tensor:
    ids = torch.from_numpy(np.concatenate([pair.prompt, completion]).astype(np.int64))
    logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
    start = len(pair.prompt)
    own = ids[start:, None]
    return logits[start - 1 :].log_softmax(-1).gather(1, own).sum()


@dataclass
class Seen:
    """What one pass over all pairs left: `captures`, the rows' pair and sequence, and the naive
    gradients of every pair's margin and of both log-probs."""

    captures: list[Capture]
    pair_id: Tensor  # (T,)
    sequence_id: Tensor | None  # (T,): 2p, 2p + 1; None where a prefix is shared
    margin: list[dict[str, Tensor]]
    chosen: list[dict[str, Tensor]]
    rejected: list[dict[str, Tensor]]

    @property
    def tied(self) -> Capture | None:
        """The embedding, where the head has its weight."""
        embedding = next(c for c in self.captures if isinstance(c.module, nn.Embedding))
        return embedding if embedding.module.weight is self.head.module.weight else None

    @property
    def head(self) -> Capture:
        return next(c for c in self.captures if c.name == "lm_head")


def gradients(model: Any, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def naive(name: str) -> dict[str, Any]:
    """Gradients of every pair by transformers' own forward, one sequence at a time."""
    model = build(name)
    capture(model)
    found: dict[str, Any] = {"margin": [], "chosen": [], "rejected": []}
    for pair in PAIRS:
        chosen, rejected = logp(model, pair, pair.chosen), logp(model, pair, pair.rejected)
        found["chosen"].append(gradients(model, chosen))
        found["rejected"].append(gradients(model, rejected))
        found["margin"].append(gradients(model, chosen - rejected))
    return found


def separate(name: str) -> Seen:
    """Sequences one by one, rows in the order chosen, rejected of every pair."""
    model = build(name)
    captures, lengths = capture(model), []
    total = torch.zeros((), dtype=torch.float64)
    for pair in PAIRS:
        for sign, completion in ((1, pair.chosen), (-1, pair.rejected)):
            total = total + sign * logp(model, pair, completion)
            lengths.append(len(pair.prompt) + len(completion) - 1)
    total.backward()
    for one in captures:
        one.grads.reverse()  # the backward went through the sequences from the last to the first
        assert one.dy.shape[0] == sum(lengths)
    sequence = torch.arange(2 * P).repeat_interleave(torch.tensor(lengths))
    return Seen(captures, sequence // 2, sequence, **naive(name))


def packed(name: str) -> Seen:
    """One packed batch with shared prefixes."""
    model = build(name)
    loading.prepare(model)
    captures = capture(model)
    batch = pack_pairs(PAIRS)
    hidden = PairModel(model, None, torch.device("cpu"), torch.float64, "").hidden(batch)
    logits = model.lm_head(hidden.index_select(0, batch.rows)[None])[0]
    rows = logits.log_softmax(-1).gather(1, batch.target[:, None]).squeeze(1)
    segments = torch.zeros(3 * P, dtype=torch.float64).index_add(0, batch.segment_id.long(), rows)
    (segments[1::3] - segments[2::3]).sum().backward()
    seen = Seen(captures, batch.pair_of_token, None, **naive(name))
    seen.head.module.rows = batch.segment_id // 3  # type: ignore[assignment]
    return seen


def rows_of(seen: Seen, one: Capture, ids: Tensor) -> Tensor:
    rows = getattr(one.module, "rows", None)
    return ids if rows is None else rows


def parts(seen: Seen, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    """Every parameter's norms, the common term of a tied weight included."""
    found: dict[str, Tensor] = {}
    for one in seen.captures:
        for name, norms in parameter_norms(one, rows_of(seen, one, ids), **options).items():
            found[name] = norms
    tied = seen.tied
    if tied is not None:
        own = rows_of(seen, seen.head, ids)
        token_id = tied.x.flatten()
        padding = tied.module.padding_idx
        unique = unique_ids(token_id, ids, padding_idx=padding, **options)  # type: ignore[arg-type]
        group = own // (options.get("group_size") or 1)
        at = unique.ids[group].clamp(min=0)
        dz = seen.head.dy.gather(1, at)
        scale = float(getattr(tied.module, "embed_scale", 1.0))
        common = tied_norms(
            unique.column, tied.dy, ids, seen.head.x, dz, own, scale=scale, **options
        )
        weight = f"{tied.name}.weight"
        found[weight] = found[weight] + found.pop("lm_head.weight") + common
    return found


def close(ours: Tensor, truth: Tensor, scale: Tensor, what: str) -> None:
    error = float(((ours - truth).abs() / scale).max())
    assert error <= 1e-12, f"{what}: {error:.1e}"


@pytest.mark.parametrize("layout", [separate, packed])
@pytest.mark.parametrize("name", NAMES)
def test_whole_model_is_the_sum_of_its_parts(name: str, layout: Any) -> None:
    seen = layout(name)
    found = parts(seen, seen.pair_id, **PAIR_ARGUMENTS)
    truth = {
        parameter: torch.stack([grads[parameter].square().sum() for grads in seen.margin])
        for parameter in seen.margin[0]
    }
    assert found.keys() == truth.keys()
    total = sum(truth.values())
    assert isinstance(total, Tensor)
    for parameter, own in truth.items():
        # A part that is 0 (a key's bias, which no softmax sees) has only the total's rounding.
        close(found[parameter], own, own + 1e-4 * total, parameter)
    close(sum(found.values()), total, total, "total")  # type: ignore[arg-type]


def test_cases_cancel_and_share_as_the_design_fears() -> None:
    """The gradients of a pair's sequences are up to 18 times as long as their difference."""
    seen = separate("llama")

    def norm(grads: dict[str, Tensor]) -> float:
        return float(sum(g.square().sum() for g in grads.values()) ** 0.5)

    ratio = [norm(c) / norm(m) for c, m in zip(seen.chosen, seen.margin, strict=True)]
    assert max(ratio) > 18, ratio


@pytest.mark.parametrize("name", NAMES)
def test_both_sequences_and_their_inner_product(name: str) -> None:
    """n_c^2, n_r^2 and <c, r>, where no prefix is shared."""
    seen = separate(name)
    assert seen.sequence_id is not None
    found = parts(seen, seen.sequence_id, num_segments=2 * P, group_size=2)
    both = [[seen.chosen[p], seen.rejected[p]] for p in range(P)]
    scale = torch.zeros(P, 2, 2, dtype=torch.float64)
    gram = {}
    for parameter in seen.chosen[0]:
        flat = torch.stack(
            [torch.stack([grads[parameter].flatten() for grads in pair]) for pair in both]
        )
        # The margin's gradient comes to the rejected rows with a minus.
        flat = flat * torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None]
        gram[parameter] = flat @ flat.transpose(1, 2)
        scale += gram[parameter].abs()
    for parameter, truth in gram.items():
        close(found[parameter], truth, scale, parameter)
    close(sum(found.values()), sum(gram.values()), scale, "total")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_inputs(name: str) -> None:
    """Inputs and gradients in bfloat16: the whole norm within 2 %, where it cancels too."""
    seen = separate(name)
    truth = sum(parts(seen, seen.pair_id, **PAIR_ARGUMENTS).values())
    for one in seen.captures:
        one.grads = [g.bfloat16() for g in one.grads]
        one.inputs = [x.bfloat16() if x.is_floating_point() else x for x in one.inputs]
    ours = sum(parts(seen, seen.pair_id, **PAIR_ARGUMENTS).values())
    assert isinstance(truth, Tensor) and isinstance(ours, Tensor)
    assert ours.dtype == torch.float32
    error = float(((ours.sqrt() - truth.sqrt()).abs() / truth.sqrt()).max())
    assert error < 0.02, error


@pytest.mark.parametrize("layout", [separate, packed])
@pytest.mark.parametrize("name", NAMES)
def test_sketches_are_those_of_the_naive_gradients(name: str, layout: Any) -> None:
    """`weight_sketch` of a pair's whole gradient, parameter by parameter, and tied uses added."""
    seen, k, seed = layout(name), 3, 7
    tied = seen.tied
    weight = None if tied is None else f"{tied.name}.weight"

    def key(parameter: str) -> str:
        return weight if weight is not None and parameter == "lm_head.weight" else parameter

    ours: dict[str, Tensor] = {}
    for one in seen.captures:
        ids = rows_of(seen, one, seen.pair_id)
        sketches = parameter_sketches(one, key, ids, k, seed=seed, num_segments=P)
        for parameter, sketch in sketches.items():
            ours[key(parameter)] = ours.get(key(parameter), 0) + sketch
    conv = {f"{c.name}.weight" for c in seen.captures if type(c.module).__name__ == "Conv1D"}
    assert ours.keys() == seen.margin[0].keys()
    for parameter, sketch in ours.items():
        truth = torch.stack(
            [
                weight_sketch(
                    grads[parameter],
                    None,
                    k,
                    seed=seed,
                    key=parameter,
                    transposed=parameter in conv,
                )
                for grads in seen.margin
            ]
        )
        scale = max(float(truth.abs().max()), 1e-6)
        torch.testing.assert_close(sketch, truth, rtol=1e-11, atol=1e-12 * scale)


def test_query_key_value_share_their_input() -> None:
    """One Gram matrix of the inputs for several weights: the sum of their norms."""
    seen = separate("llama")
    of = {c.name: c for c in seen.captures}
    names = [f"model.layers.1.self_attn.{x}_proj" for x in "qkv"]
    together = linear_norms(
        of[names[0]].x, [of[n].dy for n in names], seen.pair_id, **PAIR_ARGUMENTS
    )
    apart = sum(
        parameter_norms(of[n], seen.pair_id, **PAIR_ARGUMENTS)[f"{n}.weight"] for n in names
    )
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=0)
