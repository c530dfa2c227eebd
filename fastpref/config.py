"""One flat, frozen `Config` per run, read from YAML and `--field value`.

Names equal TRL's and transformers' where the concept is the same. A name of theirs that means
something else here, or that this version has not, is refused with a message that says what to set.
Every `Config` that exists is valid: types, choices, ranges and combinations are checked when it is
built, however it is built. The file this module writes (`to_yaml`) reads back to the same `Config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml

from fastpref.config_loss import resolve_losses
from fastpref.config_names import ELSEWHERE, ELSEWHERE_PREFIXES
from fastpref.config_options import LR_SCHEDULER_KWARGS, OPTIM_ARGS
from fastpref.config_rules import check_combinations
from fastpref.config_values import ConfigError, Options, check_value, parse_value, read_yaml

GROUPS = {
    "model": "what is trained, and in which precision",
    "lora": "which adapters learn, where trainable is lora",
    "data": "which pairs, and how they become tokens",
    "run": "where it is written, and how it goes on",
    "loss": "what is minimised",
    "optimizer": "how the weights move",
    "batch": "how many pairs make a step, and how many steps a run",
    "intervals": "how often something is written, evaluated, saved",
    "best": "which evaluation counts, when to stop early, which weights are the final ones",
    "loggers": "services that show the metrics; files are written in any case",
    "dynamics": "what is recorded about every pair and behavior",
}


def _field(
    default: Any, group: str, text: str, choices: tuple[str, ...] = (), within: str = ""
) -> Any:
    metadata = {"group": group, "help": text, "choices": choices, "within": within}
    return field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything that decides a training run. `docs/config.md` is made from these lines."""

    model_name_or_path: str = _field(
        "fastpref-tiny",
        "model",
        "Folder or Hub name of a causal LM; fastpref-tiny is a 5M Llama built once and cached.",
    )
    model_revision: str | None = _field(
        None, "model", "Branch, tag or commit on the Hub; null: the newest."
    )
    ref_model_name_or_path: str | None = _field(
        None,
        "model",
        "Another model as the reference, with the same tokenizer; null: the model as it begins.",
    )
    ref_model_revision: str | None = _field(
        None, "model", "Branch, tag or commit of ref_model_name_or_path on the Hub."
    )
    dtype: str = _field(
        "auto",
        "model",
        "Of the products; weights stay float32 (or float64). auto: bfloat16 on CUDA, else float32.",
        ("auto", "float32", "bfloat16", "float64"),
    )
    attn_implementation: str = _field(
        "auto", "model", "Attention backend by name; auto: the fastest one that fits the device."
    )
    device: str = _field("auto", "model", "auto (CUDA if there is one), cpu, cuda or cuda:N.")
    trainable: str = _field(
        "all",
        "model",
        "Which weights learn; lora: low-rank adapters on a frozen model (docs/lora.md); head: the "
        "output head alone, over hidden states computed once (docs/head.md).",
        ("all", "lora", "head"),
    )

    adapter_name_or_path: str | None = _field(
        None,
        "lora",
        "Folder or Hub name of a peft LoRA adapter to go on training; null: a fresh one.",
    )
    adapter_reference: str = _field(
        "initial",
        "lora",
        "Reference of a continued adapter: initial: the model with the adapter as it begins; base: "
        "the model without it.",
        ("initial", "base"),
    )
    lora_r: int = _field(16, "lora", "Rank of the adapters.", within="at least 1")
    lora_alpha: int = _field(
        32, "lora", "Adapters are scaled by lora_alpha / lora_r.", within="at least 1"
    )
    lora_dropout: float = _field(
        0.0,
        "lora",
        "Dropout of what enters the adapters; above 0 results depend on how batches are cut.",
        within="fraction",
    )
    lora_target_modules: tuple[str, ...] = _field(
        (),
        "lora",
        "Modules with an adapter: names or ends of names, one regular expression, or all-linear; "
        "empty: all-linear (none if lora_target_parameters is given).",
    )
    lora_exclude_modules: tuple[str, ...] = _field(
        (), "lora", "Modules left out of lora_target_modules, given the same way."
    )
    lora_target_parameters: tuple[str, ...] = _field(
        (), "lora", "Parameters with an adapter, by name or end of name, where no module has them."
    )
    lora_layers_to_transform: tuple[int, ...] = _field(
        (), "lora", "Numbers of the layers with adapters, from 0; empty: all."
    )
    lora_layers_pattern: tuple[str, ...] = _field(
        (),
        "lora",
        "Names of the lists that lora_layers_to_transform counts in, such as layers or h.",
    )
    lora_rank_pattern: tuple[str, ...] = _field(
        (),
        "lora",
        "Ranks that differ from lora_r: name=rank, by end of name or regular expression.",
    )
    lora_alpha_pattern: tuple[str, ...] = _field(
        (), "lora", "Alphas that differ from lora_alpha: name=alpha, likewise."
    )
    lora_modules_to_save: tuple[str, ...] = _field(
        (),
        "lora",
        "Modules trained whole and saved with the adapter, by end of name; not the head.",
    )
    lora_train_biases: str = _field(
        "none",
        "lora",
        "Biases of the model that learn too (peft's bias): those of the adapted modules, or all.",
        ("none", "all", "lora_only"),
    )
    lora_bias: bool = _field(False, "lora", "Give every adapter's B a bias.")
    use_rslora: bool = _field(False, "lora", "Scale by lora_alpha / sqrt(lora_r) instead.")
    use_dora: bool = _field(
        False, "lora", "Learn the size of every output row apart from its direction (DoRA)."
    )
    init_lora_weights: str = _field(
        "true",
        "lora",
        "First values of a fresh adapter, all of which leave the model as it is: true (A uniform, "
        "B zero), gaussian (A normal, B zero), orthogonal (B A = 0), mica (A zero, B fixed to the "
        "weight's smallest singular directions).",
        ("true", "gaussian", "orthogonal", "mica"),
    )
    save_merged: bool = _field(
        False,
        "lora",
        "At the end also write output_dir/merged: the model with the adapter added in.",
    )

    dataset_name: tuple[str, ...] = _field(
        (), "data", "Preference pairs: files, folders, patterns or Hub names, one or several."
    )
    dataset_weights: tuple[float, ...] = _field(
        (),
        "data",
        "For each entry of dataset_name, times that each of its pairs is taken per epoch; empty: "
        "once.",
        within="positive",
    )
    eval_dataset_name: tuple[str, ...] = _field(
        (),
        "data",
        "Held-out pairs, each entry optionally as name=path for metrics of its own; empty: "
        "eval_fraction of dataset_name is held out.",
    )
    dataset_split: str = _field(
        "train", "data", "Split of dataset_name, of Hub and Arrow data sets that have splits."
    )
    eval_dataset_split: str = _field(
        "test", "data", "Split of eval_dataset_name, of Hub and Arrow data sets that have splits."
    )
    dataset_config_name: str | None = _field(
        None, "data", "Configuration (subset) of Hub data sets; null: their default."
    )
    behavior_column: str | None = _field(
        None, "data", "Column that names a pair's behavior; null: the file's name."
    )
    flip_behaviors: tuple[str, ...] = _field(
        (), "data", "Behaviors whose chosen and rejected completions change places; all: every one."
    )
    on_bad_rows: str = _field(
        "error",
        "data",
        "error: stop before training; drop: count and list them, go on.",
        ("error", "drop"),
    )
    max_length: int = _field(
        1024, "data", "Tokens of a prompt with one completion; truncation_mode says what longer "
        "ones lose.",
        within="length",
    )  # fmt: skip
    truncation_mode: str = _field(
        "keep_start",
        "data",
        "keep_start: longer ones lose their end; keep_completion: first the start of the prompt.",
        ("keep_start", "keep_completion"),
    )
    chat_template: str | None = _field(
        None,
        "data",
        "Jinja file, or the template itself, for conversations; null: the tokenizer's.",
    )
    template_date: str | None = _field(
        None,
        "data",
        "Day (YYYY-MM-DD) for chat templates that write today's date; null: the day a run begins.",
        within="date",
    )
    append_eos: str = _field(
        "auto",
        "data",
        "End completions with the EOS token; auto: string data yes, conversations no.",
        ("auto", "true", "false"),
    )
    dataset_num_proc: int | None = _field(
        None,
        "data",
        "Processes that tokenise; results do not depend on it. null: as many as are worth it.",
        within="at least 1",
    )
    token_cache_dir: str | None = _field(
        None, "data", "Token ids, kept for other runs; null: the user's cache folder."
    )
    eval_fraction: float = _field(
        0.1,
        "data",
        "Held out per behavior, stratified by label, when eval_dataset_name is empty.",
        within="fraction",
    )
    eval_sample_size: int = _field(
        64, "data", "Pairs per behavior and split that an evaluation looks at.",
        within="at least 1",
    )  # fmt: skip

    output_dir: str = _field("runs/fastpref", "run", "Folder of the run.")
    overwrite_output_dir: bool = _field(
        False, "run", "Start anew in a folder that already holds a run, removing that run."
    )
    resume_from_checkpoint: str = _field(
        "auto", "run", "auto: newest complete checkpoint of output_dir, if any; none; or a folder."
    )
    seed: int = _field(0, "run", "Of the order, the split, dropout and sketches.", within="seed")

    loss_type: tuple[str, ...] = _field(
        ("sigmoid",), "loss", "Names of the loss table (docs/losses.md), one or a list to add up."
    )
    loss_weights: tuple[float, ...] = _field(
        (), "loss", "Weight of each loss of a list, in its order; empty: 1 each."
    )
    beta: float = _field(0.1, "loss", "Strength of the pull to the reference.", within="positive")
    label_smoothing: float = _field(
        0.0, "loss", "Probability that a label is wrong, for losses that know of it.",
        within="smoothing",
    )  # fmt: skip
    f_divergence_type: str = _field(
        "reverse_kl",
        "loss",
        "Divergence from the reference that the rewards are derived from.",
        ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    )
    f_alpha_divergence_coef: float = _field(0.5, "loss", "Alpha of alpha_divergence.")
    ld_alpha: float | None = _field(
        None,
        "loss",
        "Weight of the tokens beyond the shorter completion's length (LD-DPO); null: 1.",
        within="ratio",
    )
    use_weighting: bool = _field(
        False, "loss", "Weigh pairs by how likely the policy is to write them (WPO)."
    )
    discopop_tau: float = _field(0.05, "loss", "Temperature of discopop.", within="positive")
    simpo_gamma: float = _field(
        0.5, "loss", "Margin that simpo asks for, beta included.", within="at least 0"
    )
    cpo_alpha: float | None = _field(
        None, "loss", "Weight of cpo's likelihood term; null: 1.", within="at least 0"
    )
    rpo_alpha: float | None = _field(
        None, "loss", "Weight of rpo's likelihood term; null: 1.", within="at least 0"
    )
    router_aux_loss_coef: float | None = _field(
        None,
        "loss",
        "Weight of a mixture of experts' load-balancing loss; null: the model's own; 0: none.",
        within="at least 0",
    )
    sync_ref_model: bool = _field(
        False, "loss", "The reference follows the policy (TR-DPO); a second model in memory."
    )
    ref_model_mixup_alpha: float = _field(
        0.6, "loss", "Part of the policy in the reference at every sync.", within="mixup"
    )
    ref_model_sync_steps: int = _field(
        512, "loss", "Steps between two syncs of the reference.", within="at least 1"
    )

    optim: str = _field(
        "adamw_torch", "optimizer", "Optimizer, by transformers' name.", tuple(OPTIM_ARGS)
    )
    optim_args: Options = _field(
        (), "optimizer", "Options of sgd, rmsprop or adafactor: momentum=0.9,nesterov=true."
    )
    learning_rate: float = _field(1e-6, "optimizer", "Highest learning rate.", within="at least 0")
    weight_decay: float = _field(
        0.0, "optimizer", "Not applied to biases and norm weights.", within="at least 0"
    )
    adam_beta1: float = _field(0.9, "optimizer", "AdamW's first decay rate.", within="fraction")
    adam_beta2: float = _field(0.999, "optimizer", "AdamW's second decay rate.", within="fraction")
    adam_epsilon: float = _field(1e-8, "optimizer", "AdamW's epsilon.", within="positive")
    max_grad_norm: float = _field(
        1.0, "optimizer", "Clip the global gradient norm to this; 0: never.", within="at least 0"
    )
    lr_scheduler_type: str = _field(
        "linear",
        "optimizer",
        "Shape of the learning rate after the warm-up, by transformers' name.",
        tuple(LR_SCHEDULER_KWARGS),
    )
    lr_scheduler_kwargs: Options = _field(
        (), "optimizer", "Options of the schedule, as transformers calls them: min_lr_rate=0.1."
    )
    warmup_ratio: float | None = _field(
        None,
        "optimizer",
        "Part of all steps in which the rate rises from 0; null: 0.1, unless warmup_steps is set.",
        within="ratio",
    )
    warmup_steps: float | None = _field(
        None,
        "optimizer",
        "Steps in which the rate rises from 0, or, below 1, their part of all steps.",
        within="warmup",
    )

    num_train_epochs: float = _field(
        1.0, "batch", "Passes over the training pairs; may be fractional.", within="positive"
    )
    max_steps: int = _field(
        -1, "batch", "Optimizer steps, in place of num_train_epochs; -1: unset.", within="steps"
    )
    train_batch_size: int = _field(
        32, "batch", "Pairs per optimizer step, over all ranks together.", within="at least 1"
    )
    max_tokens_per_microbatch: int = _field(
        16384,
        "batch",
        "Packed tokens per forward, with trainable: head scored rows: the memory dial; results do "
        "not depend on it.",
        within="at least 1",
    )  # fmt: skip
    stratify: bool = _field(
        False, "batch", "Every step draws from all behaviors and labels in their proportion."
    )
    shuffle: bool = _field(True, "batch", "A new order every epoch, decided by the seed alone.")

    logging_steps: int = _field(
        10, "intervals", "Steps between two lines of metrics.jsonl.", within="at least 1"
    )
    logging_first_step: bool = _field(
        False, "intervals", "Write a line for the first step too, whatever logging_steps says."
    )
    eval_steps: int = _field(
        50,
        "intervals",
        "Steps between two evaluations, the last step included; 0: none.",
        within="at least 0",
    )
    eval_on_start: bool = _field(
        True, "intervals", "Evaluate at step 0 too, where every behavior's curve begins."
    )
    save_steps: int = _field(
        100,
        "intervals",
        "Steps between two checkpoints; the records' parts end at the same steps.",
        within="at least 1",
    )
    save_total_limit: int | None = _field(
        None,
        "intervals",
        "Checkpoints to keep: the newest, and the best if load_best_model_at_end; null: all.",
        within="at least 1",
    )

    metric_for_best_model: str | None = _field(
        None,
        "best",
        "A metric of the held-out pairs (docs/metrics.md); null: loss, if one is needed.",
    )
    greater_is_better: bool | None = _field(
        None, "best", "Whether a larger metric is better; null: unless its name ends in loss."
    )
    load_best_model_at_end: bool = _field(
        False,
        "best",
        "The final model is that of the best evaluation, of which a checkpoint is kept.",
    )
    early_stopping_patience: int | None = _field(
        None,
        "best",
        "Evaluations without a better metric after which the run stops; null: never.",
        within="at least 1",
    )
    early_stopping_threshold: float = _field(
        0.0, "best", "An evaluation counts as better only where it is so by more than this.",
        within="at least 0",
    )  # fmt: skip

    report_to: tuple[str, ...] = _field(
        (), "loggers", "tensorboard, wandb, trackio, several of them, or none."
    )
    run_name: str | None = _field(
        None, "loggers", "Name of the run in wandb and trackio; null: that of output_dir."
    )
    project: str | None = _field(
        None,
        "loggers",
        "Project of wandb and trackio; null: WANDB_PROJECT or TRACKIO_PROJECT, else fastpref.",
    )
    logging_dir: str | None = _field(
        None,
        "loggers",
        "Folder of TensorBoard's event files; null: TENSORBOARD_LOGGING_DIR, else tensorboard in "
        "output_dir.",
    )
    disable_tqdm: bool = _field(False, "loggers", "Show no progress bar.")

    record: bool = _field(True, "dynamics", "Write records/: every pair, every step, as Parquet.")
    track: str = _field(
        "head",
        "dynamics",
        "Gradient norms per pair, in the records if there are any; head: of the head, exact.",
        ("none", "head"),
    )
    track_every: int = _field(
        1, "dynamics", "Steps between two tracked steps.", within="at least 1"
    )
    sketch_dim: int = _field(16, "dynamics", "Width of a gradient sketch.", within="at least 1")
    ref_cache_dir: str | None = _field(
        None, "dynamics", "Reference log-probs; null: the user's cache folder."
    )
    feature_cache_dir: str | None = _field(
        None, "dynamics", "Hidden states of trainable: head; null: the user's cache folder."
    )
    ref_check_pairs: int = _field(
        8,
        "dynamics",
        "Pairs whose cached log-probs, or states, are computed again at the start and compared.",
        within="at least 0",
    )
    on_nonfinite: str = _field("stop", "dynamics", "At a loss that is not finite.", ("stop",))

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = parse_value(spec.name, field_types()[spec.name], getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)
            check_value(spec, value)
        names = resolve_losses(self.loss_type, self.label_smoothing)
        object.__setattr__(self, "loss_type", names)
        check_combinations(self)

    @property
    def best_metric(self) -> str | None:
        """The metric by which evaluations are compared, None where nothing asks for that."""
        asked = self.load_best_model_at_end or self.early_stopping_patience is not None
        return self.metric_for_best_model or ("loss" if asked else None)

    @property
    def part_steps(self) -> int:
        """Steps per part of records/. It equals `save_steps`, so that every checkpoint stands at
        the end of a part and a resumed run rewrites whole parts only."""
        return self.save_steps

    def to_yaml(self) -> str:
        """The whole configuration as YAML; `load_config` of this text gives an equal `Config`."""
        lines: list[str] = []
        group = ""
        for spec in dataclasses.fields(self):
            if spec.metadata["group"] != group:
                group = spec.metadata["group"]
                lines.append(f"# {group}\n")
            value = getattr(self, spec.name)
            if field_types()[spec.name] == Options:
                value = dict(value)
            value = list(value) if isinstance(value, tuple) else value
            lines.append(yaml.safe_dump({spec.name: value}, allow_unicode=True, width=10**6))
        return "".join(lines)


def field_names() -> tuple[str, ...]:
    """Names of all fields of `Config`, in order."""
    return tuple(spec.name for spec in dataclasses.fields(Config))


@functools.cache
def field_types() -> dict[str, Any]:
    """Name -> resolved type: str, int, float, bool, one of them or None, a tuple of str or float,
    or Options."""
    return typing.get_type_hints(Config)


def explain_unknown(name: str) -> str:
    """What to say about a key that is no field: its replacement here, or the nearest name."""
    reason = ELSEWHERE.get(name)
    for prefix, text in ELSEWHERE_PREFIXES.items():
        reason = reason or (text if name.startswith(prefix) else None)
    if reason:
        return reason
    near = difflib.get_close_matches(name.replace("-", "_"), field_names(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "see docs/config.md for the list"
    return f"unknown name; {hint}"


def load_config(
    path: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Config:
    """Read a YAML file of flat keys (or none) and lay `overrides` over it.

    Override values are text as typed on a command line, lists of text, or typed values; `null`
    unsets an optional field and empties a list. Raises ValueError naming file, line, key, what was
    expected and what came.
    """
    values: dict[str, Any] = {}
    where: dict[str, str] = {}
    if path is not None:
        for name, line, value in read_yaml(Path(path)):
            if name not in field_names():
                flat = "; names stand at the left margin, without groups"
                reason = explain_unknown(name) + (flat if isinstance(value, dict) else "")
                raise ValueError(f"{path}:{line}: {name}: {reason}")
            if name in values:
                raise ValueError(f"{path}:{line}: {name} stands twice, first at {where[name]}")
            values[name], where[name] = value, f"{path}:{line}: {name}"
    for name, value in (overrides or {}).items():
        if name not in field_names():
            raise ValueError(f"--{name}: {explain_unknown(name)}")
        kind = field_types()[name]
        optional = types.NoneType in typing.get_args(kind) or typing.get_origin(kind) is tuple
        values[name] = None if optional and value in ("null", ["null"]) else value
        where[name] = f"--{name}"
    try:
        return Config(**values)
    except ConfigError as error:
        place = where.get(error.field, error.field)
        raise ValueError(f"{place}: {error.reason}") from None
