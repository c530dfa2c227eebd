"""Taps: what they are attached to, what they refuse, and that they leave no trace."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from fastpref_kernels import _native
from torch import Tensor, nn

from fastpref import recompute
from fastpref.data.pack import pack_pairs
from fastpref.dynamics import tap_layers
from fastpref.dynamics.pair_ops import BlockOps, Signs
from fastpref.dynamics.pair_parts import PairParts
from fastpref.dynamics.tap_layers import Input
from fastpref.dynamics.taps import attach
from fastpref.gradients import head_norms, pair_gradients
from fastpref.tapcheck import check_taps
from tests.architectures import PAIRS, packed, tiny_model
from tests.kernels.test_norms_models import build


def llama(**changes: Any) -> Any:
    import transformers as hf

    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**shape, **changes))


class Wrapped(nn.Module):
    """A causal LM of one odd layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(4, 8, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 4))


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Squared(nn.Module):
    """No norm of those that are known: its output is not linear in the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight**2


class Gated(nn.Module):
    """A norm that wants a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * self.weight * gate


@pytest.mark.parametrize(
    "layer,named",
    [
        (Stack(), r"layer \(Stack\): gate_up_proj \(2, 8, 4\)"),
        (Twice(4, 4), r"layer \(Twice\): weight \(4, 4\), layer \(Twice\): bias \(4,\)"),
        (Squared(), r"layer \(Squared\)"),
        (Gated(), r"layer \(Gated\)"),
        (nn.Embedding(8, 4, max_norm=1.0), r"layer \(Embedding\)"),
        (nn.Embedding(8, 4, scale_grad_by_freq=True), r"layer \(Embedding\)"),
        (nn.Conv1d(4, 4, 1), r"layer \(Conv1d\)"),
    ],
)
def test_what_cannot_be_tapped_is_named(layer: nn.Module, named: str) -> None:
    with pytest.raises(ValueError, match=named + ".*Set track: head, or freeze them"):
        attach(Wrapped(layer), "sketch")
    layer.requires_grad_(False)
    assert attach(Wrapped(layer), "sketch").groups == ("head",)


def test_a_bias_of_the_head_and_shared_weights_are_named() -> None:
    model = Wrapped(nn.Identity())
    model.head = nn.Linear(4, 8)
    with pytest.raises(ValueError, match=r"head \(Linear\): bias \(8,\)"):
        attach(model, "exact")
    model.head.bias.requires_grad_(False)
    assert attach(model, "exact").groups == ("head",)
    model.layer = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model.layer[1].weight = model.layer[0].weight
    with pytest.raises(ValueError, match=r"layer.0.weight and layer.1.weight are one trained"):
        attach(model, "exact")
    model.layer = nn.Linear(4, 8, bias=False)
    model.layer.weight = model.head.weight
    with pytest.raises(ValueError, match="layer.weight and head.weight are one trained parameter"):
        attach(model, "exact")


@pytest.mark.parametrize(
    "mode,sketch_dim,message", [("gram", 4, "sketch, exact, got 'gram'"), ("exact", 0, "got 0")]
)
def test_arguments(mode: str, sketch_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(llama(), mode, sketch_dim=sketch_dim)


def test_groups() -> None:
    """In the order of the model; only those with trained weights; a tied head is `embedding`."""
    blocks = ("block.0.attention", "block.0.mlp", "block.1.attention", "block.1.mlp")
    model = llama()
    assert attach(model, "sketch").groups == ("embedding", *blocks, "norms", "head")
    assert attach(llama(tie_word_embeddings=True), "sketch").groups == (
        "embedding",
        *blocks,
        "norms",
    )
    model.requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    assert attach(model, "sketch").groups == ("block.1.mlp",)
    assert attach(build("gpt2"), "sketch").groups == ("embedding", *blocks, "norms")


def test_kinds_are_found_by_what_layers_do() -> None:
    import transformers.models.gemma3.modeling_gemma3 as gemma
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.pytorch_utils import Conv1D

    kind = tap_layers.kind_of
    assert kind(nn.Linear(3, 4)) == tap_layers.Linear(False)
    assert kind(Conv1D(4, 3)) == tap_layers.Linear(True)
    assert kind(LlamaRMSNorm(6, eps=1e-4)) == tap_layers.Norm(1e-4, False)
    assert kind(gemma.Gemma3RMSNorm(6, eps=1e-5)) == tap_layers.Norm(1e-5, False)
    assert kind(nn.RMSNorm(6)) == tap_layers.Norm(torch.finfo(torch.float32).eps, False)
    assert kind(nn.LayerNorm(6, eps=1e-3)) == tap_layers.Norm(1e-3, True)
    assert kind(nn.LayerNorm(6, bias=False)) == tap_layers.Norm(1e-5, True)
    assert kind(nn.Embedding(9, 6, padding_idx=8)) == tap_layers.Embedding(1.0, 8)
    scaled = kind(gemma.Gemma3TextScaledWordEmbedding(9, 6, 0, embed_scale=6**0.5))
    assert isinstance(scaled, tap_layers.Embedding)
    assert scaled.scale == float(torch.tensor(6**0.5)) and scaled.padding_idx == 0
    assert kind(nn.GELU()) is None


def test_an_embedding_that_wants_more_than_ids_is_unknown() -> None:
    """OPT's positions count along a second dimension; the refusal names the layer."""
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

    assert tap_layers.kind_of(OPTLearnedPositionalEmbedding(9, 6)) is None


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_blocks_whose_attention_has_no_norm_before_it(mode: str) -> None:
    """OLMo 2: the linear layers see the block's own input, which both runs are given."""
    batch, found = pack_pairs(PAIRS), []
    for own in ("none", mode):
        model = packed(tiny_model("olmo2", torch.float32))
        recompute.checkpoint_layers(model.module, own)
        found.append(pair_gradients(model, attach(model.module, "exact", sketch_dim=4), batch))
    for name in ("norm_sq", "sketch"):
        assert torch.equal(*(getattr(gradients, name) for gradients in found))


@pytest.mark.parametrize("tokens", [1, 7])
def test_one_head_is_none(tokens: int) -> None:
    """The linear layers of latent attention see their input as that of a single head."""
    x = torch.randn(tokens, 3)
    for shape in ((1, 1, tokens, 3), (1, tokens, 1, 3), (1, tokens, 3)):
        assert torch.equal(tap_layers.TokenRows("x")(x.view(shape), tokens), x)


def test_kinds_of_layers_in_half_precision() -> None:
    """Gemma's scale is what its dtype makes of it."""
    import transformers.models.gemma3.modeling_gemma3 as gemma
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    kind = tap_layers.kind_of
    assert kind(LlamaRMSNorm(6, eps=1e-4).bfloat16()) == tap_layers.Norm(1e-4, False)
    assert kind(gemma.Gemma3RMSNorm(6, eps=1e-4).bfloat16()) == tap_layers.Norm(1e-4, False)
    assert kind(nn.LayerNorm(6, eps=1e-3).bfloat16()) == tap_layers.Norm(1e-3, True)
    scaled = gemma.Gemma3TextScaledWordEmbedding(9, 6, 0, embed_scale=6**0.5).bfloat16()
    found = kind(scaled)
    assert isinstance(found, tap_layers.Embedding)
    assert found.scale == float(torch.tensor(6**0.5).bfloat16()) != float(torch.tensor(6**0.5))


@pytest.mark.parametrize("dead", [False, True])
def test_sums_of_norms(dead: bool) -> None:
    """Of float64, without C; also where a weight is 0, so that nothing of x is left in y."""
    torch.manual_seed(3)
    norm = nn.RMSNorm(6, eps=1e-6).double()
    with torch.no_grad():
        norm.weight.normal_()
        if dead:
            norm.weight[2] = 0.0
    x, dy = torch.randn(2, 9, 6, dtype=torch.float64)
    ops = BlockOps(torch.tensor([0] * 4 + [1] * 5), [4, 5], Signs(0))
    expected = torch.stack(
        [
            torch.autograd.grad((norm(x[own]) * dy[own]).sum(), norm.weight)[0]
            for own in (slice(0, 4), slice(4, 9))
        ]
    )
    torch.testing.assert_close(ops.sums(dy, x, 1e-6), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["sketch", "exact"])
def test_no_gradient_outlives_the_backward(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the graph that the hooks hang on does."""
    model = packed(tiny_model("llama", torch.float32))
    taps, batch, seen = attach(model.module, mode, sketch_dim=16), pack_pairs(PAIRS), []
    plain = Input.watch

    def watch(self: Input, tap: Any, y: Tensor, x: Tensor) -> Tensor:
        y.register_hook(lambda dy: seen.append(weakref.ref(dy)))
        return plain(self, tap, y, x)

    monkeypatch.setattr(Input, "watch", watch)
    with taps.watching(batch):
        logp = model.logp(batch, head_norms(taps)).logp
        logp.backward(torch.ones_like(logp))
    assert len(seen) == len(taps.layers) and logp.grad_fn is not None
    assert not [own for own in seen if own() is not None]
    assert taps.collect().sketch.abs().sum() > 0


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_a_last_block_that_reads_one_token(
    name: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(_native, "library", lambda: None)
    assert int(pack_pairs(PAIRS[:1]).read_spans()[1].sum()) == 1
    for dtype, close in ((torch.float32, 1e-4), (torch.float64, 1e-6)):  # of norms in float32
        model = packed(tiny_model(name, dtype))
        for mode in ("sketch", "exact"):
            assert check_taps(model, attach(model.module, mode, sketch_dim=16), PAIRS[:1]) < close


def test_hooks_of_others_stay_and_a_second_backward_is_refused() -> None:
    model, seen = packed(tiny_model("llama", torch.float32)), []
    taps, batch = attach(model.module, "sketch"), pack_pairs(PAIRS)
    for layer in model.module.model.layers:
        layer.mlp.down_proj.register_forward_hook(
            lambda module, x, y: (y.register_hook(lambda dy: seen.append(dy.shape)), None)[1]
        )
    with pytest.raises(RuntimeError, match="one backward"), taps.watching(batch):
        logp = model.logp(batch, head_norms(taps)).logp
        logp.backward(torch.ones_like(logp), retain_graph=True)
        assert len(seen) == len(model.module.model.layers)
        logp.backward(torch.ones_like(logp))


def test_rows_that_are_not_one_for_every_token_are_refused() -> None:
    """Not read as those of the first tokens."""
    model, batch = packed(tiny_model("llama", torch.float32)), pack_pairs(PAIRS)
    taps, layer = attach(model.module, "sketch"), model.module.model.layers[0].mlp.gate_proj
    with pytest.raises(RuntimeError, match="matrix"), taps.watching(batch):
        x = torch.randn(1, batch.num_tokens, 3, layer.in_features)
        layer(x).square().sum().backward()


@pytest.mark.parametrize("apart", ["batches", "backwards"])
def test_a_layer_that_is_given_a_summed_input_is_seen(apart: str) -> None:
    """A tensor that outlives a batch, or that is met again behind a backward."""
    model, batch = packed(tiny_model("llama", torch.float32)), pack_pairs(PAIRS)
    taps, mlp = attach(model.module, "sketch", sketch_dim=16), model.module.model.layers[0].mlp
    x = torch.randn(1, batch.num_tokens, mlp.gate_proj.in_features)

    def sketch(first: Tensor, second: Tensor) -> Tensor:
        with taps.watching(batch):
            mlp.gate_proj(first).square().sum().backward()
            if apart == "backwards":
                mlp.up_proj(second).square().sum().backward()
        if apart == "batches":
            taps.collect()
            with taps.watching(batch):
                mlp.up_proj(second).square().sum().backward()
        return taps.collect().sketch

    torch.testing.assert_close(sketch(x, x), sketch(x.clone(), x.clone()), rtol=1e-5, atol=1e-5)


def test_a_second_backward_of_a_part_is_refused() -> None:
    model, batch = packed(tiny_model("llama", torch.float32)), pack_pairs(PAIRS)
    taps, mlp = attach(model.module, "sketch"), model.module.model.layers[0].mlp
    x = torch.randn(1, batch.num_tokens, mlp.gate_proj.in_features)
    with pytest.raises(RuntimeError, match="one backward"), taps.watching(batch):
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        gate.sum().backward(retain_graph=True)
        gate.sum().backward()
        up.sum().backward()


def test_layers_of_one_input_are_summed_together() -> None:
    """q, k and v; gate and up; on every device, as exact norms cost less so."""
    model = packed(tiny_model("llama", torch.float32))
    taps, batch, given = attach(model.module, "exact"), pack_pairs(PAIRS), []
    plain = PairParts.linear
    with pytest.MonkeyPatch.context() as patch, taps.watching(batch):
        patch.setattr(PairParts, "linear", lambda *a: (given.append(a[2]), plain(*a)))
        logp = model.logp(batch, head_norms(taps)).logp
        logp.backward(torch.ones_like(logp))
    layers = len(model.module.model.layers)
    assert sorted(map(len, given)) == sorted([3, 1, 2, 1] * layers)


def test_the_dimension_of_tokens() -> None:
    """Of a norm of heads, also where there are as many heads as tokens."""
    rows = tap_layers.TokenRows("q_norm")
    base = torch.arange(3 * 3 * 2).view(1, 3, 3, 2)  # as a view of one row's product
    assert torch.equal(rows(base, 3), base[0])
    assert torch.equal(rows(base.transpose(1, 2), 3), base[0])
    seen = tap_layers.TokenRows("q_norm")
    seen(torch.zeros(1, 2, 5, 4), 5)
    copied = base.transpose(1, 2).contiguous()
    assert torch.equal(seen(copied, 3), base[0])
    with pytest.raises(ValueError, match=r"q_norm: sees \(4, 2\) where the batch has 3 tokens"):
        seen(torch.zeros(4, 2), 3)


def test_experts_and_dora_are_named() -> None:
    """Fused experts are one parameter of three dimensions; DoRA trains a magnitude beside A, B."""
    import peft
    import transformers as hf

    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    mixtral = hf.MixtralForCausalLM(hf.MixtralConfig(**shape))
    with pytest.raises(ValueError, match=r"experts \(MixtralExperts\): gate_up_proj \(2, "):
        attach(mixtral, "sketch")
    peft.get_peft_model(mixtral, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert attach(mixtral, "sketch").groups == ("block.0.attention",)
    dora = llama()
    peft.get_peft_model(dora, peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match=r"q_proj.lora_magnitude_vector.default \(Dora"):
        attach(dora, "sketch")


class Crossed(nn.Module):
    """A layer whose weight another one reads past its forward: no look at layers tells."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Any:
        own = self.inner(x, *more, **named)
        return own + 0.1 * nn.functional.linear(x, self.inner.down_proj.weight.t()[: x.shape[-1]])


@pytest.mark.parametrize("mode", ["sketch", "exact"])
def test_what_no_layer_tells_a_first_batch_shows(mode: str) -> None:
    from fastpref import loading
    from fastpref.model import PairModel
    from tests.kernels.test_norms_models import PAIRS

    module = build("llama")
    loading.prepare(module)
    model = PairModel(module, None, torch.device("cpu"), torch.float64, "")
    assert check_taps(model, attach(module, mode), PAIRS) < 1e-6
    assert all(p.grad is None for p in module.parameters())
    module.model.layers[1].mlp = Crossed(module.model.layers[1].mlp)
    with pytest.raises(ValueError, match="see in block.1.mlp of LlamaForCausalLM differ.*head"):
        check_taps(model, attach(module, mode), PAIRS)


def test_a_default_device_is_none_of_the_projections_business() -> None:
    x = torch.randn(5, 40)

    def projected() -> torch.Tensor:
        ops = BlockOps(torch.tensor([0, 0, 1, 1, 1], device="cpu"), [2, 3], Signs(0))
        assert ops.first.device.type == "cpu"
        return ops.project(x, "a", "in", 16)

    plain = projected()
    with torch.device("meta"):
        assert torch.equal(projected(), plain)
