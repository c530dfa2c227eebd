"""The loss fields of a configuration: what is accepted, and what every misuse is told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fastpref.config import Config, load_config
from fastpref.loss_table import ALIASES, ANSWERS, TABLE


def message(**overrides: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(None, overrides)
    return str(caught.value)


def test_one_loss_or_a_list(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("loss_type: ipo\n")
    assert load_config(file).loss_type == ("ipo",)
    file.write_text("loss_type: [sigmoid, bco_pair, sft]\nloss_weights: [0.8, 0.2, 1]\n")
    config = load_config(file)
    assert config.loss_type == ("sigmoid", "bco_pair", "sft")
    assert config.loss_weights == (0.8, 0.2, 1.0)
    assert load_config(None, {"loss_weights": ["0.5"]}).loss_weights == (0.5,)


def test_aliases_are_resolved() -> None:
    assert Config(loss_type=("dpo", "sft")).loss_type == ("sigmoid", "sft")
    assert Config(loss_type=("dpo_norm",)).loss_type == ("sigmoid_norm",)
    assert Config(loss_type=("cdpo",), label_smoothing=0.1).loss_type == ("sigmoid",)
    assert "label_smoothing above 0" in message(loss_type="cdpo")
    assert "sigmoid stands twice" in message(loss_type=["dpo", "sigmoid"])
    assert set(ALIASES.values()) <= set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_every_loss_alone_is_a_configuration(name: str) -> None:
    smoothing = 0.001 if name == "exo_pair" else 0.0
    assert Config(loss_type=(name,), label_smoothing=smoothing).loss_type == (name,)


@pytest.mark.parametrize(
    ("given", "key", "part"),
    [
        ({"loss_type": "sigmoyd"}, "loss_type", "did you mean sigmoid? There are: sigmoid, hinge"),
        ({"loss_type": "zzz"}, "loss_type", "'zzz' is no loss; There are: sigmoid"),
        ({"loss_type": "WPO"}, "loss_type", "use_weighting: true"),
        ({"loss_type": "sigmoid,sft"}, "loss_type", "several as a list, without commas"),
        ({"loss_type": "kto-pair"}, "loss_type", "removed (in TRL too)"),
        ({"loss_type": "mpo"}, "loss_type", "[sigmoid, bco_pair, sft]"),
        ({"loss_type": []}, "loss_type", "got none"),
        ({"loss_type": ["ipo", "ipo"]}, "loss_type", "ipo stands twice"),
        ({"loss_weights": [1, 2]}, "loss_weights", "2 weights for 1 losses (sigmoid)"),
        ({"loss_type": ["ipo", "sft"], "loss_weights": [1]}, "loss_weights", "1 weights for 2"),
        ({"loss_weights": [-1]}, "loss_weights", "0 or more"),
        ({"loss_weights": [0]}, "loss_weights", "not all of them 0"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing", "only for sigmoid"),
        ({"loss_type": "exo_pair"}, "label_smoothing", "0.001"),
        ({"f_divergence_type": "kl"}, "f_divergence_type", "reverse_kl or forward_kl"),
        ({"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, "f_divergence_type",
         "not defined for loss_type apo_zero, only for sigmoid"),
        ({"loss_type": ["sigmoid", "aot"], "f_divergence_type": "js_divergence"},
         "f_divergence_type", "loss_type aot,"),
        ({"loss_type": "sft", "f_divergence_type": "js_divergence"}, "f_divergence_type", "sft"),
        ({"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef", "alpha_divergence alone"),
        ({"ld_alpha": 1.5}, "ld_alpha", "0 <= value <= 1"),
        ({"loss_type": "simpo", "ld_alpha": 0.5}, "ld_alpha", "simpo has none"),
        ({"loss_type": "sft", "ld_alpha": 0.5}, "ld_alpha", "sft has none"),
        ({"loss_type": "aot", "use_weighting": "true"}, "use_weighting", "the value of aot"),
        ({"loss_type": ["sigmoid", "sft"], "use_weighting": "true"}, "use_weighting", "sft"),
        ({"discopop_tau": 0.1}, "discopop_tau", "read by discopop alone, and loss_type is sigmoid"),
        ({"discopop_tau": 0}, "discopop_tau", "more than 0"),
        ({"simpo_gamma": 1}, "simpo_gamma", "read by simpo alone"),
        ({"loss_type": "simpo", "simpo_gamma": -1}, "simpo_gamma", "0 or more"),
        ({"loss_type": "simpo", "cpo_alpha": 1}, "cpo_alpha", "[simpo, sft]"),
        ({"rpo_alpha": 1}, "rpo_alpha", "[sigmoid, sft]"),
        ({"ref_model_sync_steps": 10}, "ref_model_sync_steps", "sync_ref_model: true"),
        ({"ref_model_mixup_alpha": 0.5}, "ref_model_mixup_alpha", "sync_ref_model: true"),
        ({"sync_ref_model": "true", "ref_model_mixup_alpha": 0}, "ref_model_mixup_alpha",
         "0 < value"),
        ({"sync_ref_model": "true", "loss_type": "cpo"}, "sync_ref_model", "has no reference"),
    ],
)  # fmt: skip
def test_misuse_is_named_with_its_remedy(given: dict[str, Any], key: str, part: str) -> None:
    text = message(**given)
    where = f"--{key}: " if key in given else f"{key}: "
    assert text.startswith(where) and part in text, text


def test_what_trl_accepts_is_accepted() -> None:
    """TRL's defaults written out, as a dump of its arguments has them, and options in use."""
    Config(
        loss_type=("sigmoid",),
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        discopop_tau=0.05,
        ref_model_mixup_alpha=0.6,
        ref_model_sync_steps=512,
    )
    Config(loss_type=("robust", "sft"), label_smoothing=0.1, ld_alpha=0.0)
    Config(
        loss_type=("sigmoid", "sft"),
        f_divergence_type="alpha_divergence",
        f_alpha_divergence_coef=0.9,
    )
    Config(loss_type=("hinge", "apo_down"), use_weighting=True, ld_alpha=1.0)
    Config(sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=1)


def test_answers_name_only_what_there_is() -> None:
    for name, answer in ANSWERS.items():
        assert name not in TABLE and name not in ALIASES
        for told in re.findall(r"\b([a-z_]+):", answer):
            assert told in Config.__dataclass_fields__, (name, told)
