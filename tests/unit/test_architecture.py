"""What a model's configuration tells is refused by name, with a remedy where there is one."""

from __future__ import annotations

from typing import Any

import pytest

from fastpref.architecture import check_architecture, logit_transform


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("Qwen3NextConfig", {}, "qwen3_next has layers of type linear_attention, which carry"),
        ("Lfm2Config", {"layer_types": ["conv"], "num_hidden_layers": 1}, "convolve"),
        ("Llama4TextConfig", {}, "chunked_attention, which attend in chunks"),
        ("T5Config", {}, "t5 is an encoder-decoder"),
        ("BloomConfig", {}, "BloomForCausalLM .bloom. does not call"),
        ("ViTConfig", {}, "no causal LM for model_type 'vit'"),
        (
            "LlamaConfig",
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantised .gptq.",
        ),
        ("GPT2Config", {"n_positions": 63}, "64 is more than the 63 positions.*at most 63"),
    ],
)
def test_refused(name: str, flags: dict[str, Any], said: str) -> None:
    import transformers

    with pytest.raises(ValueError, match=said):
        check_architecture(getattr(transformers, name)(**flags), max_length=64)


def test_length_dependent_rotary_scaling_is_refused_only_where_it_begins() -> None:
    import transformers as hf

    long = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 48,
        "long_factor": [2.0] * 48,
        "original_max_position_embeddings": 4096,
    }
    phi = hf.Phi3Config(max_position_embeddings=131072, rope_parameters=long)
    check_architecture(phi, max_length=4096)
    with pytest.raises(ValueError, match="'longrope'.*beyond 4096.*at most 4096"):
        check_architecture(phi, max_length=4097)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    llama = hf.LlamaConfig(rope_parameters=dynamic)
    check_architecture(llama, max_length=llama.max_position_embeddings)
    by_layer = hf.Gemma3TextConfig(
        num_hidden_layers=6,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": long,
        },
    )
    with pytest.raises(ValueError, match="at most 4096"):
        check_architecture(by_layer, max_length=5000)


def test_the_text_part_of_a_multimodal_model_decides() -> None:
    import transformers as hf

    config = hf.Gemma3Config()
    check_architecture(config, max_length=64)
    config.text_config.final_logit_softcapping = 7.0
    assert logit_transform(config) == (7.0, 1.0)
    config.text_config.layer_types[0] = "linear_attention"
    with pytest.raises(ValueError, match="gemma3 has layers of type linear_attention"):
        check_architecture(config, max_length=64)


def test_what_stands_between_head_and_logits() -> None:
    import transformers as hf

    assert logit_transform(hf.LlamaConfig()) == (None, 1.0)
    assert logit_transform(hf.CohereConfig(logit_scale=0.25)) == (None, 0.25)
    assert logit_transform(hf.GraniteConfig(logits_scaling=8.0)) == (None, 0.125)
    assert logit_transform(hf.Gemma2Config()) == (30.0, 1.0)
