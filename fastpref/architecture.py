"""Which architectures packing computes exactly: what their configuration tells, refused by name.

What a configuration does not tell is measured at the start of a run (`fastpref.selfcheck`).
docs/models.md lists what was tried.
"""

from __future__ import annotations

from typing import Any

SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}
# Why a kind of layer cannot read pairs that share a prefix, by its name in transformers.
ODD_LAYERS = {
    "linear_attention": "carry a state from token to token (linear attention, Mamba, RWKV)",
    "hybrid": "carry a state from token to token beside their attention",
    "hybrid_sliding": "carry a state from token to token beside their attention",
    "conv": "convolve along the sequence",
    "chunked_attention": "attend in chunks counted from the start of the call",
    "indexed_attention": "attend to keys that an indexer of their own picks",
    "minimax_m3_sparse": "attend to keys that an indexer of their own picks",
    "compressed_sparse_attention": "compress their keys along the sequence",
    "heavily_compressed_attention": "compress their keys along the sequence",
}
NO_INTERFACE = (
    "does not call transformers' AttentionInterface, so its attention cannot be told about pairs "
    "that share a prefix"
)


def check_architecture(model_config: Any, max_length: int) -> None:
    """Raise ValueError for a causal LM that packing would get wrong, before its weights are read.

    ``model_config`` is transformers' configuration; ``max_length`` in tokens, of a sequence.
    """
    name, text = model_config.model_type, model_config.get_text_config(decoder=True)
    if model_config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder; packed pairs need a decoder-only model, in which the "
            "prompt and the completion are one sequence. Not supported."
        )
    odd = sorted(set(getattr(text, "layer_types", None) or ()) - SUPPORTED_LAYERS)
    if odd:
        reasons = sorted({ODD_LAYERS[kind] for kind in odd if kind in ODD_LAYERS})
        why = f", which {' and '.join(reasons)}" if reasons else ""
        raise ValueError(
            f"{name} has layers of type {', '.join(odd)}{why}; packed pairs need "
            f"{' or '.join(sorted(SUPPORTED_LAYERS))}. Not supported."
        )
    quantised = getattr(model_config, "quantization_config", None)
    if quantised:
        own = quantised if isinstance(quantised, dict) else quantised.to_dict()
        raise ValueError(
            f"the weights of this {name} are quantised ({own.get('quant_method', 'unknown')}), and "
            "quantised weights cannot be trained. Name a copy that is not."
        )
    _check_positions(name, text, max_length)
    _check_class(name, model_config)


def _check_positions(name: str, text: Any, max_length: int) -> None:
    limit = getattr(text, "max_position_embeddings", None)
    if limit and 0 < limit < max_length:
        raise ValueError(
            f"max_length={max_length} is more than the {limit} positions of {name} "
            f"(max_position_embeddings). Set max_length to at most {limit}."
        )
    for kind, original in _rotary(getattr(text, "rope_parameters", None)):
        # Both kinds change with the longest position of a call. longrope has one set of frequencies
        # up to its original length, the dynamic kind up to max_position_embeddings.
        known = (original or limit) if kind in ("longrope", "su") else limit
        if kind in ("longrope", "su", "dynamic") and (known or 0) < max_length:
            raise ValueError(
                f"{name} scales its rotary frequencies by the longest position of the call "
                f"(rope_type {kind!r}) beyond {known} positions, so a packed batch would depend on "
                f"what it holds. Set max_length to at most {known}."
            )


def _rotary(parameters: Any) -> list[tuple[str, int | None]]:
    """(rope_type, original_max_position_embeddings) of the model, or of each kind of layer."""
    if not isinstance(parameters, dict):
        return []
    found = [own for nested in parameters.values() for own in _rotary(nested)]
    kind = parameters.get("rope_type") or parameters.get("type")
    if isinstance(kind, str):
        found.append((kind, parameters.get("original_max_position_embeddings")))
    return found


def _check_class(name: str, model_config: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, __version__

    if type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"transformers {__version__} has no causal LM for model_type {name!r}.")
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]
    # A heuristic of transformers' own; `fastpref.loading.prepare` looks at what it did.
    if not found._can_set_attn_implementation():
        raise ValueError(f"{found.__name__} ({name}) {NO_INTERFACE}. Not supported.")


def logit_transform(model_config: Any) -> tuple[float | None, float]:
    """Softcap (None: none) and scale that stand between the head's product and the logits."""
    text = model_config.get_text_config(decoder=True)
    scale = getattr(text, "logit_scale", None) or 1.0  # Cohere multiplies,
    scaling = getattr(text, "logits_scaling", None) or 1.0
    if text.model_type == "hyperclovax":  # and so does HyperCLOVA X, under Granite's name;
        scale *= scaling
    else:  # Granite and MiniCPM3 divide
        scale /= scaling
    return getattr(text, "final_logit_softcapping", None), scale
