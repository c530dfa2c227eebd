"""Reading configurations: types, messages, round trips."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.config import Config, explain_unknown, load_config
from fastpref.config_names import ELSEWHERE
from fastpref.config_options import LR_SCHEDULER_KWARGS, OPTIM_ARGS

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def message(file: Path | None = None, **overrides: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(file, overrides)
    return str(caught.value)


def test_defaults_of_the_contract() -> None:
    config = load_config()
    assert config == Config()
    assert (config.beta, config.learning_rate, config.train_batch_size) == (0.1, 1e-6, 32)
    assert (config.max_length, config.save_steps, config.part_steps) == (1024, 100, 100)
    assert config.dataset_name == () and config.save_total_limit is None


def test_command_line_text_becomes_typed() -> None:
    config = load_config(
        overrides={
            "learning_rate": "1e-5",
            "train_batch_size": "8",
            "shuffle": "False",
            "dataset_name": ["a", "b"],
            "flip_behaviors": "one",
            "save_total_limit": "3",
            "append_eos": "true",
        }
    )
    assert config.learning_rate == 1e-5 and config.train_batch_size == 8
    assert config.shuffle is False and config.append_eos == "true"
    assert config.dataset_name == ("a", "b") and config.flip_behaviors == ("one",)
    assert config.save_total_limit == 3


def test_yaml_leaves_1e_6_as_text_and_true_as_bool(tmp_path: Path) -> None:
    file = write(tmp_path, "learning_rate: 2e-6\nappend_eos: true\nbeta: 1\ndataset_name: x\n")
    config = load_config(file)
    assert config.learning_rate == 2e-6 and config.append_eos == "true"
    assert config.beta == 1.0 and isinstance(config.beta, float)
    assert config.dataset_name == ("x",)


def test_overrides_win_and_null_unsets(tmp_path: Path) -> None:
    file = write(tmp_path, "save_total_limit: 2\nbeta: 0.5\nbehavior_column: kind\n")
    config = load_config(file, {"save_total_limit": "null", "beta": "0.25"})
    assert config.save_total_limit is None and config.beta == 0.25
    assert config.behavior_column == "kind"
    file = write(tmp_path, "report_to: tensorboard\nflip_behaviors:\nlora_target_modules: null\n")
    for null in ("null", ["null"]):  # of a list option the command line makes a list
        config = load_config(file, {"report_to": null})
        assert config.report_to == config.flip_behaviors == config.lora_target_modules == ()


def test_replace_checks_again() -> None:
    config = Config(dataset_name=["a"])  # type: ignore[arg-type]
    assert config.dataset_name == ("a",)
    with pytest.raises(ValueError, match="beta: expected more than 0, got 0.0"):
        dataclasses.replace(config, beta=0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.beta = 0.2  # type: ignore[misc]


def test_a_message_names_file_line_expected_and_value(tmp_path: Path) -> None:
    file = write(tmp_path, "seed: 1\nbeta: much\n")
    assert message(file) == f"{file}:2: beta: expected a finite number, got 'much'"
    assert message(max_steps="0").startswith("--max_steps: expected -1 (let num_train_epochs")


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("beta", "nan", "finite number"),
        ("beta", True, "finite number"),
        ("seed", 1.5, "whole number"),
        ("seed", "-1", "0 <= value"),
        ("seed", True, "whole number"),
        ("shuffle", "yes", "true or false"),
        ("shuffle", 1, "true or false"),
        ("output_dir", "", "empty string"),
        ("output_dir", 7, "quotes"),
        ("loss_weights", [1, "much"], "finite number"),
        ("optim", ["sgd", "adamw_torch"], "a list of 2"),
        ("dataset_name", ["a", 3], "expected text"),
        ("dataset_weights", ["1", "many"], "finite number, got 'many'"),
        ("dataset_weights", ["1", "0"], "more than 0, got 0.0"),
        ("truncation_mode", "keep_end", "keep_completion is what replaces it"),
        ("template_date", "1 May 2024", "YYYY-MM-DD"),
        ("template_date", "20240501", "YYYY-MM-DD"),
        ("dataset_num_proc", 0, "1 or more"),
        ("on_bad_rows", "skip", "error or drop"),
        ("label_smoothing", 0.5, "nothing to learn"),
        ("device", "gpu", "cuda:N"),
        ("save_steps", 0, "1 or more"),
        ("max_length", 1, "2 or more"),
        ("resume_from_checkpoint", True, "set auto"),
        ("trainable", "body", "expected all or lora or head, got 'body'"),
        ("lora_r", 0, "1 or more"),
        ("lora_alpha", 0, "1 or more"),
        ("lora_dropout", 1, "0 <= value < 1"),
        ("lora_layers_to_transform", ["1", "x"], "whole number, got 'x'"),
        ("lora_train_biases", "some", "none or all or lora_only"),
        ("init_lora_weights", False, "would not begin at its reference"),
        ("init_lora_weights", "pissa", "changes the model's own weights"),
        ("init_lora_weights", "eva", "initialize_lora_eva_weights"),
        ("track", "all", "expected none or head or sketch or exact, got 'all'"),
        ("dtype", "float16", "loss scaling"),
        ("optim", "adagrad", "got 'adagrad'; it is not in this version"),
        ("optim", "adamw_torch_4bit", "adafactor has the smallest state"),
        ("lr_scheduler_type", "reduce_lr_on_plateau", "no function of the step alone"),
        ("lr_scheduler_type", "greedy", "no function of the step alone"),
        ("warmup_steps", 2.5, "a whole number of steps, or a part of all steps below 1, got 2.5"),
        ("warmup_steps", -1, "a whole number of steps"),
        ("warmup_ratio", 1.5, "0 <= value <= 1"),
        ("greater_is_better", "perhaps", "true or false"),
        ("early_stopping_patience", 0, "1 or more"),
        ("report_to", "mlflow", "expected tensorboard, wandb, trackio"),
        ("report_to", ["none", "wandb"], "none alone"),
        ("optim_args", "momentum", "expected key=value,key=value or JSON, got 'momentum'"),
        ("optim_args", "momentum=0.9", "adamw_torch has no option 'momentum'; it has none"),
        ("optim_args", "beta1=0.9", "adam_beta1, adam_beta2, adam_epsilon and weight_decay"),
        ("optim_args", "{not json", "not valid JSON"),
        ("optim_args", {"a": [1]}, "a: expected a number, true, false or text, got [1]"),
        ("optim_args", "a=1,a=2", "a stands twice"),
        ("optim_args", {"momentum": float("inf")}, "momentum: expected a finite number"),
        ("optim_args", 3, "expected key=value,key=value or a mapping, got 3"),
        ("lr_scheduler_kwargs", "num_cycles=2", "linear has no option 'num_cycles'; it has none"),
    ],
)
def test_wrong_values(name: str, value: Any, part: str) -> None:
    text = message(**{name: value})
    assert text.startswith(f"--{name}: ") and part in text


@pytest.mark.parametrize(
    ("given", "field", "part"),
    [
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "optim_args", "did you mean momentum? it"),
        ({"optim": "sgd", "optim_args": "momentum=1"}, "optim_args", "momentum: expected 0 <= va"),
        ({"optim": "sgd", "optim_args": "nesterov=1"}, "optim_args", "nesterov: expected true or"),
        ({"optim": "sgd", "optim_args": "nesterov=true"}, "optim_args", "a momentum above 0"),
        ({"optim": "rmsprop", "optim_args": "eps=tiny"}, "optim_args", "eps: expected a number, g"),
        ({"optim": "adafactor", "optim_args": "decay_rate=1"}, "optim_args", "less than 0, got 1"),
        (
            {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": "num_cycles=1.5"},
            "lr_scheduler_kwargs",
            "num_cycles: expected a whole number, got 1.5",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "lr_scheduler_kwargs",
            "needs num_decay_steps, for example num_decay_steps=100",
        ),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": "num_decay_steps=4,decay_type=sqrt",
            },
            "lr_scheduler_kwargs",
            "decay_type: expected linear or cosine or 1-sqrt, got 'sqrt'",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_kwargs",
            "needs one of min_lr (a learning rate) and min_lr_rate",
        ),
        (
            {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": 1e-7, "min_lr_rate": 0.1},
            },
            "lr_scheduler_kwargs",
            "needs one of",
        ),
        (
            {"lr_scheduler_type": "polynomial", "learning_rate": 1e-8},
            "lr_scheduler_kwargs",
            "lr_end is 1e-07, not below learning_rate, 1e-08",
        ),
        (
            {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": 0.0},
                "learning_rate": 0,
            },
            "lr_scheduler_kwargs",
            "min_lr is 0, not below learning_rate, 0",
        ),
        ({"warmup_steps": 10, "warmup_ratio": 0.1}, "warmup_steps", "set one of them"),
        ({"eval_steps": 0, "early_stopping_patience": 2}, "early_stopping_patience", "eval_steps"),
        ({"eval_steps": 0, "load_best_model_at_end": True}, "load_best_model_at_end", "set eval_"),
        ({"eval_steps": 0, "metric_for_best_model": "loss"}, "metric_for_best_model", "is 0"),
    ],
)
def test_settings_that_contradict(given: dict[str, Any], field: str, part: str) -> None:
    text = message(**given)
    assert text.startswith((f"--{field}: ", f"{field}: ")) and part in text, text


def test_options_in_every_notation(tmp_path: Path) -> None:
    expected = (("momentum", 0.9), ("nesterov", True))
    for notation in (
        "momentum=0.9,nesterov=true",
        " nesterov = True , momentum = 0.9 ",
        '{"momentum": 0.9, "nesterov": true}',
        {"nesterov": True, "momentum": 0.9},
        ["momentum=0.9", "nesterov=true"],
        expected,
    ):
        config = load_config(None, {"optim": "sgd", "optim_args": notation})
        assert config.optim_args == expected
    file = write(tmp_path, "optim: sgd\noptim_args:\n  momentum: 0.9\n  nesterov: true\n")
    assert load_config(file) == config
    assert load_config(write(tmp_path, config.to_yaml())) == config
    assert Config(optim_args=None, lr_scheduler_kwargs={}).optim_args == ()  # type: ignore[arg-type]


def test_the_guide_lists_every_optimizer_schedule_and_option() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    for table in (OPTIM_ARGS, LR_SCHEDULER_KWARGS):
        for name, options in table.items():
            for word in (name, *options):
                assert f"`{word}`" in page, (name, word)


def test_other_spellings_of_a_value() -> None:
    assert Config(optim="adamw_torch_fused") == Config()
    assert Config(report_to="none") == Config(report_to=["none"]) == Config()  # type: ignore[arg-type]
    assert load_config(None, {"greater_is_better": "null"}) == Config()


def test_every_name_of_trl_is_a_field_or_has_an_answer() -> None:
    """A configuration of TRL's DPO script must not be met with a guess at a similar name."""
    trl = pytest.importorskip("trl")
    classes = (trl.DPOConfig, trl.ModelConfig, trl.ScriptArguments, trl.DatasetMixtureConfig)
    names = {spec.name for kind in classes for spec in dataclasses.fields(kind)}
    unanswered = [
        name
        for name in sorted(names - set(Config.__dataclass_fields__))
        if "unknown name" in explain_unknown(name)
    ]
    assert unanswered == []


def test_numbers_in_lists_and_days(tmp_path: Path) -> None:
    file = write(tmp_path, "dataset_name: [a, b]\ndataset_weights: [1, 2e-1]\n")
    file.write_text(file.read_text() + "template_date: 2024-05-01\n")  # a date to YAML
    config = load_config(file)
    assert config.dataset_weights == (1.0, 0.2) and config.template_date == "2024-05-01"
    assert load_config(file, {"dataset_weights": ["3", "4"]}).dataset_weights == (3.0, 4.0)
    file.write_text(config.to_yaml())
    assert load_config(file) == config


def test_combinations_carry_their_fix() -> None:
    assert "one number for each of the 2" in message(dataset_name=["a", "b"], dataset_weights="1")
    splits = {"dataset_split": "train", "eval_dataset_split": "train"}
    same = message(dataset_name=["a", "b"], eval_dataset_name="b", **splits)
    assert "'b' is in dataset_name too" in same and "eval_fraction" in same
    resume = "runs/x/checkpoint-4"
    wiped = message(output_dir="runs/x", overwrite_output_dir="true", resume_from_checkpoint=resume)
    assert "would remove the checkpoint" in wiped and "overwrite_output_dir: false" in wiped
    load_config(None, {"overwrite_output_dir": "true", "resume_from_checkpoint": "other/x"})


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"trainable": "all", "lora_r": 8}, "lora_r: an option of LoRA, but trainable is 'all'"),
        ({"trainable": "all", "save_merged": True}, "save_merged: an option of LoRA"),
        ({"trainable": "head", "lora_r": 8}, "lora_r: an option of LoRA, but trainable is 'head'"),
        ({"adapter_name_or_path": "x", "lora_r": 8}, "lora_r: the adapter that"),
        ({"adapter_name_or_path": "x", "use_dora": True}, "use_dora: the adapter that"),
        ({"lora_target_modules": ["q", ".*v"]}, "lora_target_modules: '.*v' cannot stand beside"),
        ({"lora_target_modules": ["all-linear", "q"]}, "'all-linear' cannot stand beside"),
        ({"lora_target_modules": "(q"}, "lora_target_modules: '(q' is not a regular expression"),
        ({"lora_exclude_modules": "*"}, "lora_exclude_modules: '*' is not a regular expression"),
        ({"lora_modules_to_save": ".*norm"}, "lora_modules_to_save: expected a name"),
        ({"lora_target_parameters": ".*w"}, "lora_target_parameters: expected a name"),
        ({"lora_layers_pattern": "h"}, "lora_layers_pattern: has a meaning with"),
        ({"lora_layers_to_transform": [1, -1]}, "layers count from 0, got -1"),
        ({"lora_layers_to_transform": 1, "lora_target_modules": ".*q"}, "not with a regular"),
        ({"lora_rank_pattern": "q"}, "lora_rank_pattern: expected name=number"),
        ({"lora_rank_pattern": "q=0"}, "number 1 or more, got 'q=0'"),
        ({"lora_alpha_pattern": "(q=3"}, "lora_alpha_pattern: '(q' is not a regular expression"),
        ({"lora_target_parameters": "w", "use_dora": True}, "use_dora: peft has no such"),
        ({"lora_target_parameters": "w", "lora_dropout": 0.1}, "lora_dropout: peft has no"),
        ({"lora_dropout": 0.1, "loss_type": "aot"}, "lora_dropout: aot sorts"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias: not with use_dora"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias: not with"),
        ({"init_lora_weights": "mica", "use_dora": True}, "exclude each other"),
        ({"init_lora_weights": "orthogonal", "lora_r": 3}, "even ranks, got 3"),
        ({"init_lora_weights": "orthogonal", "lora_rank_pattern": "q=5"}, "even ranks, got 5"),
    ],
)
def test_lora_combinations(values: dict[str, Any], part: str) -> None:
    text = message(**{"trainable": "lora", **values})
    assert text.startswith("--") and part in text


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"ref_model_revision": "v2"}, "ref_model_revision: 'v2' is one of ref_model_name_or_path"),
        ({"ref_model_name_or_path": "x", "loss_type": "simpo"}, "loss_type simpo has no reference"),
        ({"ref_model_name_or_path": "x", "sync_ref_model": True}, "no place for another"),
        (
            {
                "ref_model_name_or_path": "x",
                "trainable": "lora",
                "adapter_name_or_path": "y",
                "adapter_reference": "base",
            },
            "adapter_reference: base contradicts ref_model_name_or_path",
        ),
    ],
)
def test_another_reference(values: dict[str, Any], part: str) -> None:
    text = message(**values)
    assert text.startswith("--") and part in text


def test_lora_options_as_they_are_typed(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "trainable: lora\ninit_lora_weights: true\nlora_layers_to_transform: [0, 2]\n"
        "lora_rank_pattern: [q_proj=8, layers.0.*v_proj=4]\nlora_target_modules: all-linear\n",
    )
    config = load_config(file, {"lora_layers_pattern": "layers"})
    assert config.lora_layers_to_transform == (0, 2) and config.init_lora_weights == "true"
    assert config.lora_target_modules == ("all-linear",)
    again = write(tmp_path, config.to_yaml())
    assert load_config(again) == config
    as_in_peft = {"q_proj": 8, "layers.0.*v_proj": 4}
    assert load_config(file, {"lora_rank_pattern": as_in_peft}) == load_config(file)
    load_config(None, {"trainable": "lora", "adapter_name_or_path": "x", "lora_dropout": "0.1"})


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("betta", "did you mean beta?"),
        ("learning-rate", "did you mean learning_rate?"),
        ("datasets_name", "did you mean dataset_name?"),
        ("zzz", "docs/config.md"),
        ("per_device_train_batch_size", "train_batch_size: pairs per optimizer step"),
        ("gradient_accumulation_steps", "train_batch_size"),
        ("precompute_ref_log_probs", "always on"),
        ("padding_free", "always on"),
        ("max_prompt_length", "max_length"),
        ("max_completion_length", "max_length"),
        ("reference_free", "set loss_type"),
        ("bf16", "set dtype"),
        ("fp16", "set dtype"),
        ("activation_offloading", "gradient_checkpointing: full"),
        ("use_peft", "trainable"),
        ("lora_rank", "set lora_r"),
        ("lora_target_module", "did you mean lora_target_modules?"),
        ("lora_task_type", "always CAUSAL_LM"),
        ("ref_adapter_name", "adapter_reference"),
        ("load_in_8bit", "set load_in_4bit"),
        ("bnb_4bit_compute_dtype", "products are in dtype"),
        ("per_device_eval_batch_size", "max_tokens_per_microbatch"),
        ("eval_strategy", "set eval_steps"),
        ("save_strategy", "set save_steps"),
        ("logging_nan_inf_filter", "stops the run"),
        ("ddp_find_unused_parameters", "own reduction"),
        ("torch_compile_mode", "set torch_compile"),
        ("trackio_space_id", "environment"),
        ("dataloader_num_workers", "remove it"),
        ("chat_template_path", "set chat_template"),
    ],
)
def test_unknown_names(tmp_path: Path, name: str, part: str) -> None:
    file = write(tmp_path, f"seed: 1\n{name}: 3\n")
    text = message(file)
    assert text.startswith(f"{file}:2: {name}: ") and part in text
    assert part in message(**{name: "3"})


def test_answers_about_other_names_name_only_real_fields() -> None:
    """`set NAME` and `NAME:` in an answer must exist here."""
    for name in ELSEWHERE:
        assert name not in Config.__dataclass_fields__
        for told in re.findall(r"\bset ([a-z0-9_]+)", explain_unknown(name)):
            assert told in Config.__dataclass_fields__, (name, told)


def test_broken_files(tmp_path: Path) -> None:
    assert "cannot read" in message(tmp_path / "absent.yaml")
    assert "not valid YAML" in message(write(tmp_path, "a: [1\n"))
    assert "expected lines `key: value`" in message(write(tmp_path, "- beta\n"))
    twice = message(write(tmp_path, "beta: 1\nseed: 2\nbeta: 3\n"))
    assert ":3: beta stands twice, first at" in twice and ":1:" in twice
    assert load_config(write(tmp_path, "")) == Config()


text = st.text(min_size=1, max_size=12).filter(lambda s: s.isprintable())


@settings(deadline=None, max_examples=60)
@given(
    learning_rate=st.floats(0, 1e3),
    beta=st.floats(1e-300, 1e300),
    seed=st.integers(0, 2**63 - 1),
    dataset_name=st.lists(text, max_size=3),
    behavior_column=st.none() | text,
    output_dir=text,
    save_total_limit=st.none() | st.integers(1, 10**6),
    loss_weights=st.just([]) | st.lists(st.floats(0.1, 1e9), min_size=1, max_size=1),
    ld_alpha=st.none() | st.floats(0, 1),
    shuffle=st.booleans(),
    append_eos=st.sampled_from(["auto", "true", "false"]),
)
def test_to_yaml_round_trips_exactly(tmp_path_factory: Any, **values: Any) -> None:
    config = Config(**values)
    file = tmp_path_factory.getbasetemp() / "round.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(file) == config


def test_examples_load() -> None:
    for name in ("persona", "hh", "misalign", "lora-persona"):
        config = load_config(ROOT / "examples" / f"{name}.yaml", {"dataset_name": "x"})
        assert config.track == "head" and config.dataset_name == ("x",)


def test_no_torch() -> None:
    code = "import sys, fastpref.config, fastpref.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
