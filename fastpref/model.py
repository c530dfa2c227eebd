"""A Hugging Face causal LM as fastpref uses it: packed body, then the head on scored rows only."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastpref_kernels import LinearLogprob, linear_logprob
from torch import Tensor, nn

from fastpref import attention, base, dist, lora
from fastpref.batch import PairBatch
from fastpref.config import Config

log = logging.getLogger(__name__)

SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}
# Their rotary frequencies depend on the longest position of the call: packing would change them.
LENGTH_DEPENDENT_ROPE = {"longrope", "dynamic", "su"}


@dataclass(frozen=True)
class Head:
    """Output embedding and what stands between its product and the logits."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float


@dataclass(frozen=True)
class PairModel:
    """A causal LM, its tokenizer, and where and in which precision it computes.

    Weights are kept in float32 (float64 where asked for); bfloat16 is a compute precision, by
    autocast.
    """

    module: nn.Module
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype  # of the products
    identity: str  # names the reference's very weights, for the reference cache
    adapter: Any = None  # peft's PeftModel around `module` where LoRA learns
    reference_off: bool = False  # the reference is `module` without its adapter
    frozen_body: bool = False  # nothing but the head learns (`fastpref.head`)

    @property
    def head(self) -> Head:
        """The head, read from the module each time, because a wrapper may replace its tensors."""
        layer, config = self.module.get_output_embeddings(), self.module.config  # type: ignore[operator]
        if layer is None:
            raise ValueError(f"{type(self.module).__name__} has no output head to score tokens.")
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies,
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(layer.weight, getattr(layer, "bias", None), softcap, scale)

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

    def hidden(self, batch: PairBatch) -> Tensor:
        """(T, D) final hidden states of the packed tokens, after the last norm; those that the
        batch brings along, where it does."""
        if batch.hidden is not None:
            return batch.hidden
        layout = attention.build_layout(batch.lengths, self.device)
        with self.autocast():
            out = self.module.base_model(  # type: ignore[operator]
                input_ids=batch.tokens[None],
                position_ids=batch.positions[None],
                pair_layout=layout,
                use_cache=False,
            )
        return out.last_hidden_state[0]

    def logp(
        self, batch: PairBatch, norms: str | None = None, stats: Sequence[str] = ()
    ) -> LinearLogprob:
        """Log-probabilities of the batch's segments; `norms`, `stats` as in `linear_logprob`."""
        hidden, head = self.hidden(batch).index_select(0, batch.rows), self.head
        return linear_logprob(
            hidden.to(self.dtype),
            head.weight.to(self.dtype),
            batch.target,
            batch.segment_id,
            num_segments=batch.num_segments,
            group_size=batch.group,
            bias=None if head.bias is None else head.bias.to(self.dtype),
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            stats=stats,
            norms=norms,
        )

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
    from transformers import AutoTokenizer

    lora.refuse_as_model(config.model_name_or_path)
    with _loading(config.model_name_or_path):
        source = _source(config.model_name_or_path)
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def load_model(config: Config, tokenizer: Any = None) -> PairModel:
    """Load the weights of ``config.model_name_or_path`` and prepare them for packing.

    Raises ValueError for an architecture that packing would get wrong, and for weights that are
    not safetensors: pickled weights and remote code can run anything.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    resolve_attention(config.attn_implementation)
    if config.trainable == "lora":
        lora.check_available()
    tokenizer = tokenizer or load_tokenizer(config)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    source = _source(config.model_name_or_path)
    with _loading(config.model_name_or_path):
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    check_architecture(model_config, config.max_length)
    with _loading(config.model_name_or_path):
        module, found = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.float64 if dtype is torch.float64 else torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    # transformers fills what is not in the files with random numbers and goes on.
    absent = sorted([*found["missing_keys"], *map(str, found.get("mismatched_keys", ()))])
    if absent:
        raise ValueError(
            f"model_name_or_path={config.model_name_or_path!r}: {len(absent)} weights are not in "
            f"its files, the first being {absent[0]}. The files are not whole: get them again."
        )
    prepare(module)
    identity = weights_identity(source, module.config)
    adapter, reference_off = None, False
    if config.trainable == "lora":
        adapter = lora.attach(module, config)
        reference_off = not config.adapter_name_or_path or config.adapter_reference == "base"
        if not reference_off:
            identity += f" adapter:{lora.digest(module)}"
    module.to(device)
    return PairModel(module, tokenizer, device, dtype, identity, adapter, reference_off)


def _source(name: str) -> str:
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()  # a bar per checkpoint would break up the run's own
    if not base.is_base_name(name):
        return name
    if dist.is_main():
        base.base_dir()  # made by one rank, found by the others
    dist.barrier()
    return str(base.base_dir())


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """transformers' and safetensors' many ways of saying that something is wrong, as one."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"model_name_or_path={name!r} cannot be loaded: {error}\nExpected: a folder with "
            f"config.json, model.safetensors and a tokenizer, a Hub name, or {base.BASE_NAME!r}."
        ) from error


def prepare(module: nn.Module) -> None:
    """Put `pair_attention` into a causal LM and switch its dropout off, in place."""
    attention.register()
    module.set_attn_implementation(attention.NAME)  # type: ignore[operator]
    if module.config._attn_implementation != attention.NAME:  # type: ignore[union-attr]
        raise ValueError(
            f"{type(module).__name__} does not call transformers' AttentionInterface, so prefix "
            "sharing would give wrong numbers silently. It is not supported."
        )
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        if isinstance(getattr(layer, "attention_dropout", None), float):
            layer.attention_dropout = 0.0  # type: ignore[assignment]


def check_architecture(model_config: Any, max_length: int) -> None:
    """Refuse by name what packing cannot compute exactly; see also `fastpref.selfcheck`."""
    name = model_config.model_type
    odd = set(getattr(model_config, "layer_types", None) or ()) - SUPPORTED_LAYERS
    if odd:
        raise ValueError(
            f"{name} has layers of type {', '.join(sorted(odd))}; packed pairs need "
            f"{' or '.join(sorted(SUPPORTED_LAYERS))}."
        )
    for rope in _rope_types(getattr(model_config, "rope_parameters", None)):
        if rope in LENGTH_DEPENDENT_ROPE:
            raise ValueError(
                f"{name} scales its rotary frequencies by the length of the call (rope_type "
                f"{rope!r}); in a packed batch no sequence has that length. Not supported."
            )
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit and max_length > limit:
        raise ValueError(
            f"max_length={max_length} is more than the {limit} positions of {name} "
            f"(max_position_embeddings). Set max_length to at most {limit}."
        )


def _rope_types(parameters: Any) -> set[str]:
    if not isinstance(parameters, dict):
        return set()
    own = parameters.get("rope_type") or parameters.get("type")
    nested = (_rope_types(p) for p in parameters.values() if isinstance(p, dict))
    return ({own} if isinstance(own, str) else set()).union(*nested)


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


def resolve_attention(name: str) -> str:
    """The attention backend; ValueError for one that this version lacks."""
    if name not in ("auto", "sdpa"):
        raise ValueError(
            f"attn_implementation={name!r} is not in this version: set it to auto or sdpa."
        )
    return "sdpa"


def weights_identity(source: str, model_config: Any) -> str:
    """Names the very weights: the Hub's commit, or the digests of the local safetensors files."""
    folder = Path(source)
    if not folder.is_dir():
        commit = getattr(model_config, "_commit_hash", None)
        if not commit:
            raise ValueError(f"{source}: the Hub did not say which commit these weights are.")
        return f"{source}@{commit}"
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        with path.open("rb") as file:
            digest.update(
                f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
            )
    return f"sha256:{digest.hexdigest()}"
