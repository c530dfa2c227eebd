"""The last block behind its attention, for read tokens alone: the numbers of one that computes all,
and the arithmetic that it leaves out, counted."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastpref import last_block, quantised, recompute
from fastpref.compile import compile_blocks
from fastpref.config import Config
from fastpref.data.branches import Probe, pack_probes
from fastpref.data.pack import pack_pairs
from fastpref.dynamics.input_layers import InputLayers
from fastpref.dynamics.taps import attach
from fastpref.flops import Shape
from fastpref.gradients import pair_gradients
from fastpref.loading import prepare
from fastpref.model import PairModel
from fastpref.selfcheck import check_model
from tests.architectures import PAIRS, InFloat64, V, packed, pair, tiny_config, tiny_model

# Sequential blocks, norms behind the MLP, Conv1D, attention and MLP side by side, an MLP that is no
# module of its own.
DENSE = ("llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "phi", "opt")
WITHOUT_PROMPT = pair(9, 0, 3, 2, 4)
BATCH = pack_pairs([*PAIRS, WITHOUT_PROMPT])


def run(model: PairModel, compute: Callable[[], Tensor]) -> tuple[list[Tensor], int]:
    """What ``compute`` gives and the gradients of all weights; operations of matrix products."""
    for p in model.trained:
        p.grad = None
    with FlopCounterMode(display=False) as counter:
        out = compute()
        (
            out * torch.linspace(-1.0, 2.0, out.numel(), dtype=out.dtype).view_as(out)
        ).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.trained]
    return [out.detach(), *grads], counter.get_total_flops()


def both(model: PairModel, compute: Callable[[], Tensor]) -> tuple[list[Tensor], list[Tensor], int]:
    """Narrowed, wide, and the operations that the first leaves out."""
    ours, fewer = run(model, compute)
    assert last_block.widen(model.module) > 0
    plain, all_of_them = run(model, compute)
    prepare(model.module)
    return ours, plain, all_of_them - fewer


def assert_same(ours: list[Tensor], plain: list[Tensor], tolerance: float = 1e-12) -> None:
    largest = max(float(y.norm()) for y in plain[1:])
    for x, y in zip(ours, plain, strict=True):
        assert float((x - y).norm()) <= tolerance * max(float(y.norm()), 1e-3 * largest)


def saved(model: PairModel, unread: int) -> float:
    """A forward and two products of the backward, of the layers' weights with unread tokens."""
    return 3 * 2 * unread * Shape.of(model.module).last


@pytest.mark.parametrize("name", DENSE)
def test_values_and_gradients_are_those_of_all_tokens(name: str) -> None:
    model = packed(tiny_model(name))
    narrowed = {
        n for n, m in model.module.named_modules() if m in last_block.narrowed(model.module)
    }
    assert len(narrowed) == (3 if name == "opt" else 2)
    assert all(".1." in n for n in narrowed)  # of two blocks
    with InFloat64():
        ours, plain, fewer = both(model, lambda: model.logp(BATCH).logp)
    assert_same(ours, plain)
    assert fewer == saved(model, BATCH.unread) > 0


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_mixtures_of_experts_are_left_as_they_are(name: str) -> None:
    module = tiny_model(name)
    prepare(module)
    assert not last_block.narrowed(module) and Shape.of(module).last == 0


def test_what_is_read_is_what_rows_point_at() -> None:
    for own in ([*PAIRS, WITHOUT_PROMPT], [WITHOUT_PROMPT], PAIRS[3:4]):
        for batch in (pack_pairs(own), pack_pairs(own).with_tails()):
            read = last_block.read_tokens(batch, "cpu")
            rows = torch.arange(batch.num_tokens) if read is None else read.rows
            assert rows.tolist() == sorted(set(batch.rows.tolist()))
            assert batch.unread == batch.num_tokens - len(rows)
        whole = pack_pairs(own, whole=True)
        read = last_block.read_tokens(whole, "cpu")
        assert read is None or set(whole.rows.tolist()) <= set(read.rows.tolist())
    assert last_block.read_tokens(pack_pairs([WITHOUT_PROMPT]), "cpu") is None


def test_all_states_where_all_are_asked_for() -> None:
    model = packed(tiny_model("llama"))
    with torch.no_grad():
        every, some = model.hidden(BATCH), model.hidden(BATCH, scored_only=True)
        last_block.widen(model.module)
        assert torch.equal(every, model.hidden(BATCH))
    assert torch.equal(some[BATCH.rows], every[BATCH.rows])
    assert not torch.allclose(some, every)


def test_probes() -> None:
    rng = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return rng.integers(0, V, count).astype(np.int32)

    prompts = [ids(9), ids(4), ids(0)]
    groups = [[Probe(i, i, 0, "", p, ids(n)) for n in (1, 5, 3)] for i, p in enumerate(prompts)]
    batch, model = pack_probes(groups), packed(tiny_model("llama"))
    unread = sum(max(len(p) - 1, 0) for p in prompts)
    for logp in (model.logp, model.row_logp):
        ours, plain, fewer = both(model, lambda logp=logp: logp(batch).logp)  # type: ignore[misc]
        assert_same(ours, plain)
        assert fewer == saved(model, unread)


def test_the_feature_of_a_pair() -> None:
    model = packed(tiny_model("llama"))
    ours = model.logp_and_features(BATCH)[1]
    last_block.widen(model.module)
    assert torch.equal(ours, model.logp_and_features(BATCH)[1])


def test_outside_of_a_packed_batch_the_module_is_the_plain_one() -> None:
    module = tiny_model("llama")
    ids = torch.arange(12)[None] % V
    keys, plain = list(module.state_dict()), module(ids).logits
    answer = module.generate(ids, max_new_tokens=4, do_sample=False)
    model = packed(module)
    assert last_block.narrowed(module) and list(module.state_dict()) == keys
    with model.plain_attention():
        assert torch.equal(module(ids).logits, plain)
        assert torch.equal(module.generate(ids, max_new_tokens=4, do_sample=False), answer)


def test_stand_ins_of_the_planner_are_known() -> None:
    """On torch's meta device, quantised or not: what a run narrows its rehearsal narrows too."""
    for four_bits in (False, True):
        config = Config(
            model_name_or_path="m",
            dataset_name=("d",),
            trainable="lora",
            load_in_4bit=four_bits,
        )
        with torch.device("meta"):
            module = type(tiny_model("llama"))(tiny_config("llama"))
            quantised.stand_in(module, config)
            prepare(module)
        assert len(last_block.narrowed(module)) == 2


def test_a_copy_computes_with_weights_of_its_own() -> None:
    model = packed(tiny_model("gpt2"))
    other = dataclasses.replace(model, module=copy.deepcopy(model.module))
    before = model.logp(BATCH).logp
    assert torch.equal(other.logp(BATCH).logp, before)
    parts = last_block.narrowed(other.module)
    assert len(parts) == 2 and not {id(m) for m in parts} & {id(m) for m in model.module.modules()}
    with torch.no_grad():
        for part in parts:
            for p in part.parameters():
                p.mul_(1.5)
    assert torch.equal(model.logp(BATCH).logp, before)
    assert not torch.allclose(other.logp(BATCH).logp, before)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_has_the_same_bits(mode: str) -> None:
    model = packed(tiny_model("llama"))
    plain, _ = run(model, lambda: model.logp(BATCH).logp)
    recompute.checkpoint_layers(model.module, mode)
    ours, plain_again, fewer = both(model, lambda: model.logp(BATCH).logp)
    assert all(torch.equal(x, y) for x, y in zip(ours, plain, strict=True))
    assert_same(ours, plain_again)
    assert fewer >= saved(model, BATCH.unread)


def test_adapters_in_the_mlp() -> None:
    peft = pytest.importorskip("peft")
    module = tiny_model("llama")
    settings = peft.LoraConfig(r=3, target_modules=["o_proj", "up_proj", "down_proj"])
    peft.get_peft_model(module, settings)
    module.double()
    torch.manual_seed(0)
    with torch.no_grad():  # B begins at zero, which would hide A's gradient
        for p in module.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    model = packed(module)
    ours, plain, fewer = both(model, lambda: model.logp(BATCH).logp)
    assert_same(ours, plain)
    shape = Shape.of(module)
    # Frozen weights have no gradient of their own.
    assert fewer == 2 * BATCH.unread * (2 * shape.last + shape.last_trained)
    assert 0 < shape.last_trained < shape.last


def test_taps_in_the_mlp_see_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """And their norms, sketches and products with a change are those of all tokens."""
    model = packed(tiny_model("llama"))
    taps = attach(model.module, "exact", sketch_dim=4)
    change = {p: torch.ones_like(p) for p in model.trained}
    rows, plain = dict[str, int](), InputLayers.add

    def noted(self: InputLayers, parts: Any, x: Any, gradients: list[Tensor]) -> None:
        rows.update({place.name: gradients[i].shape[-2] for i, place in self.weights})
        plain(self, parts, x, gradients)

    monkeypatch.setattr(InputLayers, "add", noted)
    ours = pair_gradients(model, taps, BATCH, change=change)
    every, read = BATCH.num_tokens, BATCH.num_tokens - BATCH.unread
    inside = {n for n, count in rows.items() if count == read}
    assert inside == {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert {rows[n] for n in rows.keys() - inside} == {every}
    last_block.widen(model.module)
    rows.clear()
    wide = pair_gradients(model, taps, BATCH, change=change)
    assert set(rows.values()) == {every}
    for name in ("norm_sq", "sketch", "change"):
        x, y = getattr(ours, name), getattr(wide, name)
        assert float((x - y).abs().max()) <= 1e-12 * float(y.abs().max())


def test_bfloat16_under_autocast() -> None:
    """As much off the float32 values as the wide block is."""
    model = packed(tiny_model("llama", torch.float32))
    exact = model.logp(BATCH).logp.detach()
    rough = dataclasses.replace(model, dtype=torch.bfloat16)
    ours, plain, fewer = both(rough, lambda: rough.logp(BATCH).logp)
    assert fewer == saved(model, BATCH.unread)
    errors = [float((x[0] - exact).norm() / exact.norm()) for x in (ours, plain)]
    assert errors[0] < 2 * errors[1] + 1e-3 and errors[1] < 0.05
    assert_same(ours, plain, 0.05)


def test_a_block_that_is_not_as_assumed_is_widened_by_the_self_check(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It runs twice: what it gives a token in its first turn is read by others in the second."""
    module: Any = tiny_model("llama")
    module.model.layers.append(module.model.layers[-1])
    module.config.num_hidden_layers = 3
    model = packed(module)
    assert last_block.narrowed(module)
    with caplog.at_level(logging.WARNING):
        assert check_model(model, PAIRS) < 1e-5
    assert "computed for every token" in caplog.text
    assert not last_block.narrowed(module)
    caplog.clear()
    model = packed(tiny_model("llama"))
    assert check_model(model, PAIRS) < 1e-5
    assert not caplog.text and last_block.narrowed(model.module)


def test_a_block_that_runs_twice_is_widened_where_rounding_hides_it() -> None:
    """In bfloat16 the gradients of a model of two alternating stacks differ by less than what
    packing is allowed."""
    model = packed(tiny_model("hrm_text", torch.bfloat16))
    assert last_block.narrowed(model.module)
    check_model(model, PAIRS)
    assert not last_block.narrowed(model.module)


def test_an_mlp_that_mixes_tokens_is_found_out() -> None:
    module: Any = tiny_model("llama")
    mlp = module.model.layers[-1].mlp

    class Mixing(type(mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + x.mean(dim=1, keepdim=True))

    mlp.__class__ = Mixing
    prepare(module)
    assert not last_block.narrowed(module)


def test_compiled_blocks_are_wide() -> None:
    module = tiny_model("llama")
    prepare(module)
    compile_blocks(module)
    assert not last_block.narrowed(module)
