"""The list of configuration names is frozen, so that its growth is a decision; docs follow it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fastpref.config import GROUPS, Config, field_names

ROOT = Path(__file__).resolve().parents[2]

FROZEN = """
model_name_or_path model_revision ref_model_name_or_path ref_model_revision
dtype weights_dtype master_weights gradient_checkpointing torch_compile attn_implementation
device trainable
load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant
adapter_name_or_path adapter_reference lora_r lora_alpha lora_dropout lora_target_modules
lora_exclude_modules lora_target_parameters lora_layers_to_transform lora_layers_pattern
lora_rank_pattern lora_alpha_pattern lora_modules_to_save lora_train_biases lora_bias use_rslora
use_dora init_lora_weights save_merged
dataset_name dataset_weights eval_dataset_name dataset_split eval_dataset_split dataset_config_name
behavior_column flip_behaviors on_bad_rows
max_length truncation_mode chat_template template_date append_eos dataset_num_proc token_cache_dir
eval_fraction eval_sample_size
output_dir overwrite_output_dir resume_from_checkpoint seed
loss_type loss_weights beta label_smoothing f_divergence_type f_alpha_divergence_coef ld_alpha
use_weighting discopop_tau simpo_gamma cpo_alpha rpo_alpha
balance target_share balance_every balance_limit balance_gain
router_aux_loss_coef sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
optim optim_args learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps
num_train_epochs max_steps train_batch_size max_tokens_per_microbatch stratify shuffle
logging_steps logging_first_step eval_steps eval_on_start save_steps save_total_limit
metric_for_best_model greater_is_better load_best_model_at_end
early_stopping_patience early_stopping_threshold
report_to run_name project logging_dir disable_tqdm peak_tflops profile
record track track_every sketch_dim rate_every rate_pairs
probe_every probes probe_prompts probe_types probe_influence
ref_cache_dir feature_cache_dir ref_check_pairs
on_nonfinite
"""


def test_names_are_the_frozen_ones() -> None:
    assert list(field_names()) == FROZEN.split()


def test_every_field_has_a_help_text_and_a_group() -> None:
    for spec in Config.__dataclass_fields__.values():
        assert spec.metadata["group"] in GROUPS, spec.name
        assert len(spec.metadata["help"]) > 7 and spec.metadata["help"].endswith("."), spec.name


def test_docs_agree_with_the_dataclass() -> None:
    script = ROOT / "docs" / "config_table.py"
    module_spec = importlib.util.spec_from_file_location("config_table", script)
    assert module_spec and module_spec.loader
    script_module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(script_module)
    page = script_module.PAGE.read_text(encoding="utf-8")
    assert page.endswith(script_module.MARK + script_module.tables()), (
        "docs/config.md is out of date; run: python docs/config_table.py"
    )
    for name in field_names():
        assert f"| `{name}` |" in page
