"""A Hugging Face causal LM as fastpref uses it: packed body, then the head on scored rows only."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from fastpref_kernels import LinearLogprob, linear_logprob
from torch import Tensor, nn

from fastpref import attention, lora, quantised
from fastpref.architecture import NO_INTERFACE, logit_transform
from fastpref.attention import Layout
from fastpref.attention_backends import SDPA, Backend, choose_backend, demand_backend
from fastpref.batch import PairBatch, ProbeBatch
from fastpref.config import Config, unplanned
from fastpref.recompute import checkpoint_layers
from fastpref.router import Load, Router, find_router
from fastpref.tracing import named
from fastpref.weights import Source, read_model_config, read_tokenizer, read_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Head:
    """Output embedding and what stands between its product and the logits."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float


@dataclass(frozen=True)
class HeadNorms:
    """What `linear_logprob` is to bring of the gradients in the head's weight."""

    method: str = "exact"  # its `norms`
    sketch_dim: int = 16
    seed: int = 0
    key: str = "lm_head"
    rows: bool = False  # and every row's log-prob and state

    def arguments(self) -> dict[str, Any]:
        """Of `linear_logprob`."""
        sketch = {"sketch_dim": self.sketch_dim, "sketch_seed": self.seed, "sketch_key": self.key}
        return {"norms": self.method, **sketch}


@dataclass(frozen=True)
class Scored(LinearLogprob):
    """`LinearLogprob`, and the states that were scored where `HeadNorms.rows` asks for them."""

    hidden: Tensor | None = None  # (R, D) detached


@dataclass(frozen=True)
class PairModel:
    """A causal LM, its tokenizer, and where and in which precision it computes.

    Weights are kept in float32 (float64 where asked for), or in bfloat16 by `weights_dtype`;
    bfloat16 as the precision of products is autocast's.
    """

    module: nn.Module
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype  # of the products
    identity: str  # names the reference's very weights, for the reference cache
    adapter: Any = None  # peft's PeftModel around `module` where LoRA learns
    router: Router | None = None  # of a mixture of experts whose balance is part of the loss
    reference_off: bool = False  # the reference is `module` without its adapter
    frozen_body: bool = False  # nothing but the head learns (`fastpref.head`)
    attention: Backend = SDPA

    @property
    def head(self) -> Head:
        """The head, read from the module each time, because a wrapper may replace its tensors."""
        layer = self.module.get_output_embeddings()  # type: ignore[operator]
        if layer is None:
            raise ValueError(f"{type(self.module).__name__} has no output head to score tokens.")
        return Head(layer.weight, getattr(layer, "bias", None), *self._transform)

    @functools.cached_property
    def _transform(self) -> tuple[float | None, float]:
        return logit_transform(self.module.config)

    @functools.cached_property
    def head_is_all(self) -> bool:
        """Whether nothing learns but the head's weight."""
        return self.frozen_body and self.head.bias is None

    @functools.cached_property
    def trained(self) -> list[nn.Parameter]:
        """What learns, in the module's order; read once, as walking a module takes a while."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model computes."""
        if self.dtype in (torch.float32, torch.float64):
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def hidden(self, batch: PairBatch | ProbeBatch) -> Tensor:
        """(T, D) final hidden states of the packed tokens, after the last norm; those that the
        batch brings along, where it does."""
        if batch.hidden is not None:
            return batch.hidden
        return self._body(batch).last_hidden_state[0]

    def _body(self, batch: PairBatch | ProbeBatch, **asked: bool) -> Any:
        with named("data"):
            layout = attention.build_layout(batch.lengths, self.device, self.attention)
        return self._run(batch.tokens, batch.positions, layout, **asked)

    def _run(self, tokens: Tensor, positions: Tensor, layout: Layout, **asked: bool) -> Any:
        with named("forward"), self.autocast(), attention.ambient(layout):
            return self.module.base_model(  # type: ignore[operator]
                input_ids=tokens[None],
                position_ids=positions[None],
                pair_layout=layout,
                use_cache=False,
                **asked,
            )

    @torch.no_grad()
    def lacks(self, backends: Sequence[Backend]) -> dict[str, str]:
        """Backend of attention -> what it does not compute of what the layers ask for.

        From a forward of a few tokens. Where that fails it says nothing: the self-check will.
        """
        layout = attention.NotingLayout(attention.build_dense([(2, 1, 1)], self.device), backends)
        tokens, positions = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 2]], device=self.device)
        try:
            self._run(tokens, positions, layout)
        except Exception as error:
            log.debug("no forward of four tokens: %s", error)
        return layout.lacks

    def logp(
        self,
        batch: PairBatch | ProbeBatch,
        norms: HeadNorms | str | None = None,
        stats: Sequence[str] = (),
        *,
        head_frozen: bool = False,
    ) -> Scored:
        """Log-probabilities of the batch's segments; `stats` as in `linear_logprob`.

        `head_frozen`: the head counts as a constant, so that no gradient of it is made.
        """
        return self._score(self.hidden(batch), batch, norms, stats, head_frozen=head_frozen)

    def row_logp(self, batch: ProbeBatch, stats: Sequence[str] = ()) -> Scored:
        """`logp` with every row a segment of its own."""
        return self._score(self.hidden(batch), batch, None, stats, by_row=True)

    def logp_and_features(
        self, batch: PairBatch, norms: HeadNorms | str | None = None, stats: Sequence[str] = ()
    ) -> tuple[Scored, Tensor]:
        """`logp`, and (P, D) each pair's feature as `fastpref.frozen` defines it: the state that
        predicts the first token in which the completions part, times the logit scale."""
        hidden = self.hidden(batch)
        row = batch.first_own_rows().amax(dim=0)  # one of them may be missing, not both
        features = hidden.index_select(0, batch.rows[row]) * self.head.logit_scale
        return self._score(hidden, batch, norms, stats), features

    def routed_logp(
        self, batch: PairBatch, norms: HeadNorms | str | None = None, stats: Sequence[str] = ()
    ) -> tuple[Scored, Load | None]:
        """`logp`; and, where the balance of routers is part of the loss, what they did with the
        batch's tokens in the same forward."""
        if self.router is None:
            return self.logp(batch, norms, stats), None
        hidden, load = self._routed(self.router, batch)
        return self._score(hidden, batch, norms, stats), load

    @torch.no_grad()
    def load(self, batch: PairBatch) -> Tensor:
        """What the routers do with the batch's tokens, as `Load.packed`."""
        assert self.router
        return self._routed(self.router, batch)[1].packed()

    def _routed(self, router: Router, batch: PairBatch) -> tuple[Tensor, Load]:
        assert batch.whole, "every token is routed, also those that predict nothing"
        out = self._body(batch, output_router_logits=True)
        load = router.load(out.router_logits, batch.sequences_of_token())
        return out.last_hidden_state[0], load

    def _score(
        self,
        hidden: Tensor,
        batch: PairBatch | ProbeBatch,
        norms: HeadNorms | str | None,
        stats: Sequence[str],
        *,
        head_frozen: bool = False,
        by_row: bool = False,
    ) -> Scored:
        with named("head"):
            return self._scored(hidden, batch, norms, stats, head_frozen, by_row)

    def _scored(
        self,
        hidden: Tensor,
        batch: PairBatch | ProbeBatch,
        norms: HeadNorms | str | None,
        stats: Sequence[str],
        head_frozen: bool,
        by_row: bool,
    ) -> Scored:
        head = self.head
        if isinstance(norms, str):
            norms = HeadNorms(norms)
        kept = norms is not None and norms.rows
        rows = hidden.index_select(0, batch.rows).to(self.dtype)
        out = linear_logprob(
            rows,
            (head.weight.detach() if head_frozen else head.weight).to(self.dtype),
            batch.target,
            None if by_row else batch.segment_id,
            num_segments=batch.rows.numel() if by_row else batch.num_segments,
            counts=None if by_row else batch.counts,
            group_size=1 if by_row else batch.group,
            bias=None if head.bias is None else head.bias.to(self.dtype),
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            stats=(*stats, "row_logp") if kept else stats,
            **(norms.arguments() if norms else {}),
        )
        return Scored(**vars(out), hidden=rows.detach() if kept else None)

    def as_reference(self) -> AbstractContextManager[None]:
        """Inside, before training, the module computes as its own reference."""
        return lora.off(self.adapter) if self.reference_off else nullcontext()

    def dropout(self) -> AbstractContextManager[None]:
        """Inside, what dropout there is, is on: a training step."""
        return nullcontext() if self.adapter is None else lora.dropout(self.adapter)

    @contextmanager
    def plain_attention(self) -> Iterator[None]:
        """Inside, the module computes as transformers ships it, one sequence a row."""
        plain = "sdpa" if getattr(self.module, "_supports_sdpa", False) else "eager"
        self.module.set_attn_implementation(plain)  # type: ignore[operator]
        try:
            yield
        finally:
            self.module.set_attn_implementation(attention.NAME)  # type: ignore[operator]


def load_tokenizer(config: Config) -> Any:
    """The tokenizer of ``config.model_name_or_path``; ValueError where there is none."""
    lora.refuse_as_model(config.model_name_or_path)
    return read_tokenizer(_policy(config))


def load_model(config: Config, tokenizer: Any = None) -> PairModel:
    """Load the weights of ``config.model_name_or_path`` and prepare them for packing.

    Raises ValueError as `read_weights` does: for what packing would get wrong, for weights that are
    not safetensors or not all there.
    """
    device = resolve_device(config.device)
    demand_backend(config.attn_implementation, device, resolve_dtype(config.dtype, device))
    if config.trainable == "lora":
        lora.check_available()
    if config.load_in_4bit:
        quantised.demand_packages()
    tokenizer = tokenizer or load_tokenizer(config)
    model = _load(config, _policy(config), tokenizer)
    model = replace(model, router=_router(model, config))
    if config.trainable == "lora":
        model = _adapted(model, config)
    return _with_attention(_placed(model), config.attn_implementation)


def skeleton(config: Config) -> PairModel:
    """The model that `load_model` would give, with weights that nobody has set: for torch's meta
    device. On the CPU, without a tokenizer."""
    model = _skeleton(config, _policy(config))
    model = replace(model, router=_router(model, config))
    return _adapted(model, config) if config.trainable == "lora" else model


def reference_skeleton(config: Config) -> PairModel:
    """As `skeleton`, of `load_reference`."""
    return _skeleton(config, _reference(config))


def _skeleton(config: Config, source: Source) -> PairModel:
    from transformers import AutoModelForCausalLM

    model_config = read_model_config(source, config.max_length)[0]
    cpu = torch.device("cpu")
    dtype = resolve_dtype(config.dtype, cpu)
    module = AutoModelForCausalLM.from_config(model_config, dtype=_kept_dtype(config, dtype, cpu))
    quantised.stand_in(module, config)
    prepare(module)
    checkpoint_layers(module, config.gradient_checkpointing)
    return PairModel(module, None, cpu, dtype, "")


def load_reference(config: Config) -> PairModel:
    """The model of ``config.ref_model_name_or_path`` with its tokenizer, frozen; as `load_model`.

    Whether it reads the same tokens is for the caller to see.
    """
    source = _reference(config)
    reference = _load(config, source, read_tokenizer(source))
    reference.module.requires_grad_(False)
    return _with_attention(_placed(reference), "auto")


def _policy(config: Config) -> Source:
    return Source("model_name_or_path", config.model_name_or_path, config.model_revision)


def _reference(config: Config) -> Source:
    assert config.ref_model_name_or_path
    name, revision = config.ref_model_name_or_path, config.ref_model_revision
    return Source("ref_model_name_or_path", name, revision)


def _load(config: Config, source: Source, tokenizer: Any) -> PairModel:
    """Still on the CPU."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    kept = _kept_dtype(config, dtype, device)
    more = quantised.loading_options(config, dtype, device)
    module, identity = read_weights(source, kept, config.max_length, device, more)
    identity += quantised.identity(config)
    quantised.settle(module)
    if kept is torch.bfloat16:  # other log-probs than those of the files' own precision
        identity += " weights:bfloat16"
    prepare(module)
    checkpoint_layers(module, unplanned(config).gradient_checkpointing)
    return PairModel(module, tokenizer, device, dtype, identity)


def _kept_dtype(config: Config, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the weights in memory, beside products in ``dtype``."""
    if dtype is torch.float64:
        return dtype
    kept: torch.dtype = getattr(torch, config.weights_dtype)
    if kept is torch.bfloat16 and dtype is not torch.bfloat16:
        raise ValueError(
            f"weights_dtype: bfloat16 needs products in bfloat16, and dtype: {config.dtype} means "
            f"{str(dtype)[6:]} on {device}. Set dtype: bfloat16."
        )
    return kept


def _router(model: PairModel, config: Config) -> Router | None:
    if config.trainable == "head":  # no gradient reaches a router
        return None
    router = find_router(model.module.config, config.router_aux_loss_coef)
    if router and config.trainable == "lora" and config.lora_dropout:
        raise ValueError(
            f"lora_dropout={config.lora_dropout}: the load-balancing loss of this model's routers "
            f"(router_aux_loss_coef={router.coef}) wants the routing of a whole step before its "
            "gradient, and dropout would change it in between. Set one of the two to 0."
        )
    if router and config.torch_compile:
        raise ValueError(
            "torch_compile: the load-balancing loss of this model's routers (router_aux_loss_coef="
            f"{router.coef}) reads what they chose, which a compiled block does not show. Set "
            "torch_compile: false, or router_aux_loss_coef: 0."
        )
    return router


def routes(config: Config) -> bool:
    """Whether the balance of routers is part of the loss, from the model's configuration alone."""
    if config.trainable == "head":
        return False
    model_config = read_model_config(_policy(config), config.max_length)[0]
    return find_router(model_config, config.router_aux_loss_coef) is not None


def _adapted(model: PairModel, config: Config) -> PairModel:
    adapter = lora.attach(model.module, config)
    reference_off = not config.adapter_name_or_path or config.adapter_reference == "base"
    identity = model.identity
    if not reference_off:
        identity += f" adapter:{lora.digest(model.module)}"
    return replace(model, adapter=adapter, reference_off=reference_off, identity=identity)


def _placed(model: PairModel) -> PairModel:
    try:
        model.module.to(model.device)
    except torch.OutOfMemoryError as error:
        size = sum(p.numel() * p.element_size() for p in model.module.parameters())
        raise ValueError(
            f"{size / 2**30:.1f} GiB of weights ({type(model.module).__name__}) do not fit on "
            f"{model.device}: {error}"
        ) from error
    return model


def _with_attention(model: PairModel, name: str) -> PairModel:
    backend, others = choose_backend(name, model.device, model.dtype, model.lacks)
    why = "".join(f"; not {other}: {reason}" for other, reason in others.items())
    log.info("attention: %s%s", backend.name, why if model.device.type == "cuda" else "")
    return replace(model, attention=backend)


def prepare(module: nn.Module) -> None:
    """Put `pair_attention` into a causal LM and switch its dropout off, in place."""
    attention.register()
    module.set_attn_implementation(attention.NAME)  # type: ignore[operator]
    if module.config._attn_implementation != attention.NAME:  # type: ignore[union-attr]
        raise ValueError(f"{type(module).__name__} {NO_INTERFACE}. Not supported.")
    # The sampled routing and the noise of some mixtures of experts end with the training mode too.
    module.eval()
    for layer in module.modules():  # for those that are put into training mode again
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        if isinstance(getattr(layer, "attention_dropout", None), float):
            layer.attention_dropout = 0.0  # type: ignore[assignment]
    if next(module.parameters()).dtype is torch.float64:
        _experts_one_by_one(module)


def _experts_one_by_one(module: Any) -> None:
    """torch has grouped products of experts in single and half precision only."""
    if module._can_set_experts_implementation():
        module.set_experts_implementation("eager")


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; under torchrun the rank's own."""
    if name != "auto":
        device = torch.device(name)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device={name!r}: there are {torch.cuda.device_count()} CUDA devices here. Set "
                "device to auto or cpu, or install a torch with CUDA."
            )
        return device
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 compute on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
