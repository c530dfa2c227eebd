"""Tiny random models of every architecture that transformers has as a causal LM.

Each is built from its own configuration class with its own default flags; only sizes are changed.
All parameters get noise, so that none is at a value where a mistake would not show (a norm's 1, a
bias's 0).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from fastpref import loading
from fastpref.architecture import check_architecture
from fastpref.data.tokenize import TokenPair
from fastpref.model import PairModel
from fastpref.selfcheck import check_model

V = 61
WINDOW = 5  # shorter than most of `PAIRS`
MAX_LENGTH = 32
# By attribute of the configuration; what a class does not have is left out.
SIZES: dict[str, Any] = {
    "vocab_size": V,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 4),
    "v_head_dim": 8,
    "sliding_window": WINDOW,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "word_embed_proj_dim": 32,
    "state_size": 4,
    "vocab_size_per_layer_input": V,
    "hidden_size_per_layer_input": 4,
}
# Ids that tiny vocabularies lack; those that a class leaves unset stay so.
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# What a class wants in addition, or cannot have small.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "granitemoehybrid": {"mamba_n_heads": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},  # as those that were released
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The configuration of ``model_type``, small; ``changes`` go over everything else."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return kind(**{**_small(kind), **OWN.get(model_type, {}), **changes})


def _small(kind: Any) -> dict[str, Any]:
    default = kind()
    small = {name: size for name, size in SIZES.items() if _takes(kind, default, name)}
    for name, own in TOKENS.items():
        given = getattr(default, name, None)
        if isinstance(given, int) and given >= V:
            small[name] = own
    if "qk_rope_head_dim" in small:  # latent attention: a head's width is the sum of its parts,
        small.pop("head_dim", None)
        small["num_key_value_heads"] = small["num_attention_heads"]  # and each has its own keys
    parts = {name: getattr(default, name) for name in kind.sub_configs}
    return small | {name: _small(type(part)) for name, part in parts.items() if part is not None}


def _takes(kind: Any, default: Any, name: str) -> bool:
    try:
        own = getattr(kind, name, None)
        return (
            hasattr(default, name)
            and not isinstance(own, property)
            and (name != "sliding_window" or getattr(default, name) is not None)
        )
    except Exception:  # Gemma 4 and others, whose layers each have a value of their own
        return False


def tiny_model(model_type: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A causal LM of `tiny_config`, random from a fixed seed, not prepared for packing."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).to(dtype)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    return module.eval()


def packed(module: Any) -> PairModel:
    """``module`` as fastpref computes with it, in the precision of its weights; in place."""
    loading.prepare(module)
    return PairModel(module, None, torch.device("cpu"), module.dtype, "")


def pair(n: int, prompt: int, common: int, chosen: int, rejected: int) -> TokenPair:
    """Random ids; the completions' rests differ in their first token."""
    rng = np.random.default_rng(n)
    start = rng.integers(0, V, common)
    rest = [rng.integers(0, V, k) for k in (chosen, rejected)]
    if chosen and rejected:
        rest[1][0] = (rest[0][0] + 1) % V
    ids = [rng.integers(0, V, prompt), np.r_[start, rest[0]], np.r_[start, rest[1]]]
    return TokenPair(n, 0, "", *(x.astype(np.int32) for x in ids), truncated=False)


# One token each; common starts; one completion that begins the other; lengths that need blocks of
# their own and lengths that are gathered together with padding; longer than the window.
PAIRS = [
    pair(0, 9, 0, 1, 1),
    pair(1, 3, 4, 6, 2),
    pair(2, 14, 2, 9, 12),
    pair(3, 8, 0, 3, 1),
    pair(4, 5, 3, 0, 2),
    pair(5, 1, 0, 2, 5),
    pair(6, 8, 1, 2, 2),
]


class InFloat64(TorchFunctionMode):
    """Inside, what a model computes in float32 by its own will (norms, rotary angles, softmax) is
    computed in float64, so that a float64 model can be compared beyond float32's rounding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = [torch.float64 if a is torch.float32 else a for a in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*wide, **named)


def verdict(model_type: str) -> tuple[bool, str]:
    """Whether fastpref trains ``model_type``, and the reason where it does not.

    What the class's own default configuration tells, then a tiny model through the self-check.
    """
    from transformers import CONFIG_MAPPING

    try:
        check_architecture(CONFIG_MAPPING[model_type](), MAX_LENGTH)
        check_architecture(tiny_config(model_type), MAX_LENGTH)
        check_model(packed(tiny_model(model_type)), PAIRS)
    except ValueError as refusal:
        return False, str(refusal)
    return True, ""
