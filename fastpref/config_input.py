"""Options of a run: what is trained, on which data, and where the run is written."""

from __future__ import annotations

import dataclasses

from fastpref.config_values import option


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InputOptions:
    """Fields of `fastpref.config.Config`, first half."""

    model_name_or_path: str = option(
        "fastpref-tiny",
        "model",
        "Folder or Hub name of a causal LM; fastpref-tiny is a 5M Llama built once and cached.",
    )
    model_revision: str | None = option(
        None, "model", "Branch, tag or commit on the Hub; null: the newest."
    )
    ref_model_name_or_path: str | None = option(
        None,
        "model",
        "Another model as the reference, with the same tokenizer; null: the model as it begins.",
    )
    ref_model_revision: str | None = option(
        None, "model", "Branch, tag or commit of ref_model_name_or_path on the Hub."
    )
    dtype: str = option(
        "auto",
        "model",
        "Of the products. auto: bfloat16 on CUDA, else float32.",
        ("auto", "float32", "bfloat16", "float64"),
    )
    weights_dtype: str = option(
        "float32",
        "model",
        "Of the weights in memory (float64 with dtype: float64); bfloat16 halves them and their "
        "gradients and needs dtype: bfloat16.",
        ("float32", "bfloat16"),
    )
    master_weights: bool = option(
        True,
        "model",
        "The optimizer moves float32 copies of bfloat16 weights; false: updates below a weight's "
        "resolution are lost.",
    )
    gradient_checkpointing: str = option(
        "none",
        "model",
        "What the backward computes again instead of keeping it: none; selective: all but products "
        "and attention; full: whole layers; auto: the least that fits (docs/plan.md).",
        ("none", "selective", "full", "auto"),
    )
    torch_compile: bool = option(
        False,
        "model",
        "Compile the decoder blocks, attention apart; numbers change by rounding (docs/perf.md).",
    )
    attn_implementation: str = option(
        "auto",
        "model",
        "Attention backend (docs/attention.md). auto: on CUDA in half precision flash-attn if "
        "installed, else torch's varlen; sdpa elsewhere and for what these lack.",
        ("auto", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "varlen"),
    )
    device: str = option("auto", "model", "auto (CUDA if there is one), cpu, cuda or cuda:N.")
    trainable: str = option(
        "all",
        "model",
        "Which weights learn; lora: low-rank adapters on a frozen model (docs/lora.md); head: the "
        "output head alone, over hidden states computed once (docs/head.md).",
        ("all", "lora", "head"),
    )

    load_in_4bit: bool = option(
        False,
        "lora",
        "Keep the frozen linear layers in 4 bits (QLoRA, bitsandbytes); docs/lora.md.",
    )
    bnb_4bit_quant_type: str = option(
        "nf4", "lora", "Numbers of 4 bits that weights are rounded to.", ("nf4", "fp4")
    )
    use_bnb_nested_quant: bool = option(
        False, "lora", "Also quantise the scales of the blocks of 4-bit weights."
    )
    adapter_name_or_path: str | None = option(
        None,
        "lora",
        "Folder or Hub name of a peft LoRA adapter to go on training; null: a fresh one.",
    )
    adapter_reference: str = option(
        "initial",
        "lora",
        "Reference of a continued adapter: initial: the model with the adapter as it begins; base: "
        "the model without it.",
        ("initial", "base"),
    )
    lora_r: int = option(16, "lora", "Rank of the adapters.", within="at least 1")
    lora_alpha: int = option(
        32, "lora", "Adapters are scaled by lora_alpha / lora_r.", within="at least 1"
    )
    lora_dropout: float = option(
        0.0,
        "lora",
        "Dropout of what enters the adapters; above 0 results depend on how batches are cut.",
        within="fraction",
    )
    lora_target_modules: tuple[str, ...] = option(
        (),
        "lora",
        "Modules with an adapter: names or ends of names, one regular expression, or all-linear; "
        "empty: all-linear (none if lora_target_parameters is given).",
    )
    lora_exclude_modules: tuple[str, ...] = option(
        (), "lora", "Modules left out of lora_target_modules, given the same way."
    )
    lora_target_parameters: tuple[str, ...] = option(
        (), "lora", "Parameters with an adapter, by name or end of name, where no module has them."
    )
    lora_layers_to_transform: tuple[int, ...] = option(
        (), "lora", "Numbers of the layers with adapters, from 0; empty: all."
    )
    lora_layers_pattern: tuple[str, ...] = option(
        (),
        "lora",
        "Names of the lists that lora_layers_to_transform counts in, such as layers or h.",
    )
    lora_rank_pattern: tuple[str, ...] = option(
        (),
        "lora",
        "Ranks that differ from lora_r: name=rank, by end of name or regular expression.",
    )
    lora_alpha_pattern: tuple[str, ...] = option(
        (), "lora", "Alphas that differ from lora_alpha: name=alpha, likewise."
    )
    lora_modules_to_save: tuple[str, ...] = option(
        (),
        "lora",
        "Modules trained whole and saved with the adapter, by end of name; not the head.",
    )
    lora_train_biases: str = option(
        "none",
        "lora",
        "Biases of the model that learn too (peft's bias): those of the adapted modules, or all.",
        ("none", "all", "lora_only"),
    )
    lora_bias: bool = option(False, "lora", "Give every adapter's B a bias.")
    use_rslora: bool = option(False, "lora", "Scale by lora_alpha / sqrt(lora_r) instead.")
    use_dora: bool = option(
        False, "lora", "Learn the size of every output row apart from its direction (DoRA)."
    )
    init_lora_weights: str = option(
        "true",
        "lora",
        "First values of a fresh adapter, all of which leave the model as it is: true (A uniform, "
        "B zero), gaussian (A normal, B zero), orthogonal (B A = 0), mica (A zero, B fixed to the "
        "weight's smallest singular directions).",
        ("true", "gaussian", "orthogonal", "mica"),
    )
    save_merged: bool = option(
        False,
        "lora",
        "At the end also write output_dir/merged: the model with the adapter added in.",
    )

    dataset_name: tuple[str, ...] = option(
        (), "data", "Preference pairs: files, folders, patterns or Hub names, one or several."
    )
    dataset_weights: tuple[float, ...] = option(
        (),
        "data",
        "For each entry of dataset_name, times that each of its pairs is taken per epoch; empty: "
        "once.",
        within="positive",
    )
    eval_dataset_name: tuple[str, ...] = option(
        (),
        "data",
        "Held-out pairs, each entry optionally as name=path for metrics of its own; empty: "
        "eval_fraction of dataset_name is held out.",
    )
    dataset_split: str = option(
        "train", "data", "Split of dataset_name, of Hub and Arrow data sets that have splits."
    )
    eval_dataset_split: str = option(
        "test", "data", "Split of eval_dataset_name, of Hub and Arrow data sets that have splits."
    )
    dataset_config_name: str | None = option(
        None, "data", "Configuration (subset) of Hub data sets; null: their default."
    )
    behavior_column: str | None = option(
        None, "data", "Column that names a pair's behavior; null: the file's name."
    )
    flip_behaviors: tuple[str, ...] = option(
        (), "data", "Behaviors whose chosen and rejected completions change places; all: every one."
    )
    on_bad_rows: str = option(
        "error",
        "data",
        "error: stop before training; drop: count and list them, go on.",
        ("error", "drop"),
    )
    max_length: int = option(
        1024, "data", "Tokens of a prompt with one completion; truncation_mode says what longer "
        "ones lose.",
        within="length",
    )  # fmt: skip
    truncation_mode: str = option(
        "keep_start",
        "data",
        "keep_start: longer ones lose their end; keep_completion: first the start of the prompt.",
        ("keep_start", "keep_completion"),
    )
    chat_template: str | None = option(
        None,
        "data",
        "Jinja file, or the template itself, for conversations; null: the tokenizer's.",
    )
    template_date: str | None = option(
        None,
        "data",
        "Day (YYYY-MM-DD) for chat templates that write today's date; null: the day a run begins.",
        within="date",
    )
    append_eos: str = option(
        "auto",
        "data",
        "End completions with the EOS token; auto: string data yes, conversations no.",
        ("auto", "true", "false"),
    )
    dataset_num_proc: int | None = option(
        None,
        "data",
        "Processes that tokenise; results do not depend on it. null: as many as are worth it.",
        within="at least 1",
    )
    token_cache_dir: str | None = option(
        None, "data", "Token ids, kept for other runs; null: the user's cache folder."
    )
    eval_fraction: float = option(
        0.1,
        "data",
        "Held out per behavior, stratified by label, when eval_dataset_name is empty.",
        within="fraction",
    )
    eval_sample_size: int = option(
        64, "data", "Pairs per behavior and split that an evaluation looks at.",
        within="at least 1",
    )  # fmt: skip

    output_dir: str = option("runs/fastpref", "run", "Folder of the run.")
    overwrite_output_dir: bool = option(
        False, "run", "Start anew in a folder that already holds a run, removing that run."
    )
    resume_from_checkpoint: str = option(
        "auto", "run", "auto: newest complete checkpoint of output_dir, if any; none; or a folder."
    )
    seed: int = option(0, "run", "Of the order, the split, dropout and sketches.", within="seed")
