"""Names of TRL and transformers that users type, and values of later versions of fastpref.

Each answer says what to set instead, or that this version has nothing like it.
"""

from __future__ import annotations

NOT_YET = "not in this version of fastpref; remove it"
MEMORY = "set max_tokens_per_microbatch (packed tokens per forward); results do not depend on it"
DTYPE = "set dtype: auto, float32, bfloat16 or float64"
EVALUATION = "set eval_steps: optimizer steps between two evaluations, 0 for none"
IN_STEPS = "an epoch has (training pairs / train_batch_size) steps"
REDUCED = "sums are over all ranks, whatever their number; remove it"
DDP = "ranks share gradients by fastpref's own reduction; remove it"
ADAPTER_REFERENCE = (
    "a fresh adapter's reference is the model without it, a continued one's (adapter_name_or_path) "
    "is what adapter_reference says; remove it"
)
ELSEWHERE: dict[str, str] = {
    # What people type, and what LLaMA-Factory and axolotl call it.
    "config": "the file stands first, without an option: fastpref train FILE.yaml",
    "lr": "set learning_rate",
    "batch_size": "set train_batch_size: pairs per optimizer step over all ranks",
    "micro_batch_size": MEMORY,
    "num_epochs": "set num_train_epochs",
    "epochs": "set num_train_epochs",
    "lr_scheduler": "set lr_scheduler_type",
    "optimizer": "set optim",
    "pref_beta": "set beta",
    "rl_beta": "set beta",
    "pref_loss": "set loss_type",
    "cutoff_len": "set max_length",
    "sequence_len": "set max_length",
    # What transformers and TRL call it.
    "per_device_train_batch_size": "set train_batch_size: pairs per optimizer step over all ranks "
    "(per_device_train_batch_size x gradient_accumulation_steps x ranks); " + MEMORY,
    "gradient_accumulation_steps": "set train_batch_size: pairs per optimizer step over all ranks; "
    + MEMORY,
    "per_device_eval_batch_size": MEMORY,
    "eval_accumulation_steps": MEMORY,
    "auto_find_batch_size": MEMORY,
    "precompute_ref_log_probs": "always on: reference log-probs are computed once and cached; "
    "ref_cache_dir says where; remove it",
    "precompute_ref_batch_size": "the reference pass is planned by itself; remove it",
    "padding_free": "always on: batches are packed without padding; remove it",
    "packing": "always on: batches are packed without padding; remove it",
    "pad_to_multiple_of": "there is no padding; remove it",
    "max_prompt_length": "removed (in TRL too): max_length bounds prompt and completion together; "
    "with truncation_mode: keep_completion long prompts lose their start first",
    "max_completion_length": "removed (in TRL too): max_length bounds prompt and completion "
    "together; truncation_mode says which of them gives way",
    "chat_template_path": "set chat_template: a Jinja file, or the template's text",
    "reference_free": "set loss_type to a loss without a reference: simpo, orpo, cpo or sft",
    "gamma_beta_ratio": "set simpo_gamma: beta x gamma_beta_ratio",
    "alpha": "AlphaPO's reward is " + NOT_YET,
    "bf16": DTYPE,
    "fp16": DTYPE + "; float16 needs loss scaling, which this version has not",
    "tf32": DTYPE,
    "torch_dtype": DTYPE,
    "activation_offloading": NOT_YET + " and, if memory is short, set gradient_checkpointing: full",
    "use_peft": "set trainable: lora",
    "peft_config": "set trainable: lora and the lora_ fields",
    "lora_task_type": "always CAUSAL_LM; remove it",
    "lora_fan_in_fan_out": "found from the model; remove it",
    "lora_rank": "set lora_r",
    "lora_target": "set lora_target_modules",
    "lora_init": "set init_lora_weights",
    "lora_model_dir": "set adapter_name_or_path",
    "model_adapter_name": ADAPTER_REFERENCE,
    "ref_adapter_name": ADAPTER_REFERENCE,
    "force_use_ref_model": ADAPTER_REFERENCE,
    "load_in_8bit": "set load_in_4bit, or weights_dtype: bfloat16",
    "bnb_4bit_use_double_quant": "set use_bnb_nested_quant",
    "bnb_4bit_compute_dtype": "products are in dtype, with weights of 4 bits as well; remove it",
    "bnb_4bit_quant_storage": "weights of 4 bits lie in bytes; remove it",
    "logging_strategy": "set logging_steps: optimizer steps between two lines; " + IN_STEPS,
    "eval_strategy": EVALUATION + "; " + IN_STEPS,
    "evaluation_strategy": EVALUATION + "; " + IN_STEPS,
    "do_eval": EVALUATION,
    "eval_delay": EVALUATION + "; the first one is at step 0, or, with eval_on_start: false, there",
    "prediction_loss_only": EVALUATION + "; every metric is written",
    "save_strategy": "set save_steps: optimizer steps between two checkpoints; " + IN_STEPS + "; "
    "load_best_model_at_end saves at every better evaluation as well",
    "save_only_model": "checkpoints are whole, so that a run can go on; the final model stands in "
    "output_dir without optimizer state; remove it",
    "dataloader_num_workers": "batches are built in the training process; remove it",
    "dataset_train_split": "set dataset_split",
    "dataset_test_split": "set eval_dataset_split (and eval_dataset_name)",
    "dataset_config": "set dataset_config_name",
    "datasets": "set dataset_name to the list of files, folders, patterns or Hub names",
    "dataset_streaming": "pairs are read once, as a whole; remove it",
    "streaming": "pairs are read once, as a whole; remove it",
    "include_num_input_tokens_seen": "always on: num_tokens counts them; remove it",
    "logging_nan_inf_filter": "a loss that is not finite stops the run; remove it",
    "log_on_each_node": "rank 0 alone writes; remove it",
    "save_on_each_node": "rank 0 alone writes; remove it",
    "average_tokens_across_devices": REDUCED,
    "optim_target_modules": "no optimizer of this version has target modules; remove it",
    "label_smoothing_factor": "set label_smoothing",
    "neftune_noise_alpha": "noise on embeddings is " + NOT_YET,
    "full_determinism": "always on: the same seed gives the same bits; remove it",
    "ignore_data_skip": "a run goes on with the very next pair; remove it",
    "remove_unused_columns": "columns that are not known are left alone; remove it",
    "train_sampling_strategy": "set shuffle and stratify",
    "use_cache": "training needs no key-value cache; remove it",
    "torch_empty_cache_steps": MEMORY,
    **dict.fromkeys(
        (
            "accelerator_config",
            "batch_eval_metrics",
            "debug",
            "enable_jit_checkpoint",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "ignore_bias_buffers",
            "include_for_metrics",
            "label_names",
            "length_column_name",
            "liger_kernel_config",
            "local_rank",
            "restore_callback_states_from_checkpoint",
            "skip_memory_metrics",
        ),
        "it is about the inside of transformers' Trainer and has no counterpart here; remove it",
    ),
    "parallelism_config": "sharded training is " + NOT_YET,
    "model_init_kwargs": "set dtype and attn_implementation",
    "pad_token": "there is no padding; remove it",
    "test_split_size": "set eval_fraction",
    "do_train": "this command trains; remove it",
    "do_predict": "there is no prediction; `fastpref report` shows what a run has learnt",
    "push_to_hub": "nothing is uploaded; remove it",
    "trust_remote_code": "code from the Hub is never run; remove it",
    "disable_dropout": "dropout is always off; remove it",
    "data_seed": "set seed; it decides the order of the data too",
    "use_liger_kernel": "the fused head is always on; remove it",
    "use_cpu": "set device: cpu",
    "ref_model": "set ref_model_name_or_path; without it the reference is the model as it stands "
    "before the first step",
    "ref_model_path": "set ref_model_name_or_path",
    "revision": "set model_revision",
    "torch_compile_backend": "set torch_compile; inductor compiles",
    "torch_compile_mode": "set torch_compile; it has one mode",
}
ELSEWHERE_PREFIXES: dict[str, str] = {
    "bnb_": "set load_in_4bit, bnb_4bit_quant_type, use_bnb_nested_quant",
    "fsdp": "sharded training is " + NOT_YET,
    "deepspeed": "sharded training is " + NOT_YET,
    "hub_": "nothing is uploaded; remove it",
    "dataloader_": "batches are built in the training process; remove it",
    "ddp_": DDP,
    "trackio_": "set project and run_name; trackio reads the rest from its environment variables",
    "gradient_checkpointing": NOT_YET + " and, if memory is short, " + MEMORY,
    "activation_checkpointing": NOT_YET + " and, if memory is short, " + MEMORY,
    "bf16": DTYPE,
    "fp16": DTYPE,
    "log_level": "set the environment variable TRANSFORMERS_VERBOSITY for transformers' messages",
}
ALIASES: dict[tuple[str, object], object] = {
    ("optim", "adamw_torch_fused"): "adamw_torch",  # fused it is in any case
    ("optim", "adamw_bnb_8bit"): "adamw_8bit",
    ("report_to", ("none",)): (),
}
NO_RATE = "; its rate depends on the metrics seen so far, so it is no function of the step alone"
SMALL_STATE = (
    "; it is not in this version; of these, adafactor has the smallest state, then adamw_8bit"
)
LATER = {
    ("lr_scheduler_type", "reduce_lr_on_plateau"): NO_RATE,
    ("lr_scheduler_type", "greedy"): NO_RATE,
    ("optim", "adamw_hf"): "; adamw_torch computes the same",
    ("optim", "adagrad"): "; it is not in this version",
    ("optim", "paged_adamw_32bit"): SMALL_STATE,
    ("optim", "adamw_torch_8bit"): SMALL_STATE,
    ("optim", "adamw_torch_4bit"): SMALL_STATE,
    ("optim", "lion_32bit"): SMALL_STATE,
    ("optim", "lion_8bit"): SMALL_STATE,
    (
        "init_lora_weights",
        "false",
    ): "; with random A and B the run would not begin at its reference",
    **{
        (
            "init_lora_weights",
            name,
        ): "; it changes the model's own weights. Initialise with peft, save "
        "the changed model and the adapter (its init_lora_weights set to true), and name them as "
        "model_name_or_path and adapter_name_or_path"
        for name in ("pissa", "olora", "corda", "lora_ga", "loftq")
    },
    ("init_lora_weights", "eva"): "; it needs a pass over the data: initialise with peft's "
    "initialize_lora_eva_weights, save the adapter and name it as adapter_name_or_path",
    ("truncation_mode", "keep_end"): "; keep_completion is what replaces it: the prompt loses its "
    "start, the same for both completions",
    ("dtype", "float16"): "; float16 needs loss scaling, which this version has not",
}
