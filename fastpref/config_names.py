"""Names of TRL and transformers that users type, and values of later versions of fastpref.

Each answer says what to set instead, or that this version has nothing like it.
"""

from __future__ import annotations

NOT_YET = "not in this version of fastpref; remove it"
MEMORY = "set max_tokens_per_microbatch (packed tokens per forward); results do not depend on it"
DTYPE = "set dtype: auto, float32, bfloat16 or float64"
LOGGERS = "metrics are written to metrics.jsonl and records/ in output_dir; remove it"
ADAPTER_REFERENCE = (
    "a fresh adapter's reference is the model without it, a continued one's (adapter_name_or_path) "
    "is what adapter_reference says; remove it"
)
ELSEWHERE: dict[str, str] = {
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
    "max_prompt_length": "removed (in TRL too): max_length bounds prompt and completion together",
    "max_completion_length": "removed (in TRL too): max_length bounds prompt and completion "
    "together",
    "truncation_mode": "the end is cut (TRL's keep_start); set max_length",
    "reference_free": "set loss_type to a loss without a reference: simpo, orpo, cpo or sft",
    "gamma_beta_ratio": "set simpo_gamma: beta x gamma_beta_ratio",
    "alpha": "AlphaPO's reward is " + NOT_YET,
    "bf16": DTYPE,
    "fp16": DTYPE + "; float16 needs loss scaling, which this version has not",
    "tf32": DTYPE,
    "torch_dtype": DTYPE,
    "gradient_checkpointing": NOT_YET + " and, if memory is short, " + MEMORY,
    "activation_offloading": NOT_YET + " and, if memory is short, " + MEMORY,
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
    "load_in_4bit": "quantised weights are " + NOT_YET,
    "load_in_8bit": "quantised weights are " + NOT_YET,
    "warmup_steps": "set warmup_ratio: warm-up steps divided by all steps",
    "logging_strategy": "set logging_steps",
    "eval_strategy": "set eval_steps; 0 means no evaluation",
    "evaluation_strategy": "set eval_steps; 0 means no evaluation",
    "do_eval": "set eval_steps; 0 means no evaluation",
    "save_strategy": "set save_steps",
    "load_best_model_at_end": NOT_YET,
    "dataset_num_proc": "reading and tokenising need no workers; remove it",
    "dataloader_num_workers": "batches are built in the training process; remove it",
    "dataset_train_split": "set dataset_split",
    "dataset_test_split": "set eval_dataset_split (and eval_dataset_name)",
    "dataset_config": "set dataset_config_name",
    "datasets": "set dataset_name to the list of files, folders, patterns or Hub names",
    "dataset_streaming": "pairs are read once, as a whole; remove it",
    "report_to": LOGGERS,
    "run_name": "set output_dir; the folder is the run's name",
    "logging_dir": LOGGERS,
    "push_to_hub": "nothing is uploaded; remove it",
    "trust_remote_code": "code from the Hub is never run; remove it",
    "disable_dropout": "dropout is always off; remove it",
    "data_seed": "set seed; it decides the order of the data too",
    "use_liger_kernel": "the fused head is always on; remove it",
    "use_cpu": "set device: cpu",
    "torch_compile": NOT_YET,
    "lr_scheduler_kwargs": NOT_YET,
    "ref_model": "the reference is the model as it stands before the first step; remove it",
}
ELSEWHERE_PREFIXES: dict[str, str] = {
    "bnb_": "quantised weights are " + NOT_YET,
    "fsdp": "sharded training is " + NOT_YET,
    "deepspeed": "sharded training is " + NOT_YET,
    "hub_": "nothing is uploaded; remove it",
    "dataloader_": "batches are built in the training process; remove it",
}
LATER = {
    ("trainable", "head"): "; training the head alone is not in this version",
    ("track", "sketch"): "; sketched norms of the whole model are not in this version",
    ("track", "exact"): "; exact norms of the whole model are not in this version",
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
    ("dtype", "float16"): "; float16 needs loss scaling, which this version has not",
}
