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
from fastpref.config_rules import check_combinations
from fastpref.config_values import ConfigError, check_value, parse_value, read_yaml

GROUPS = ("model", "lora", "data", "run", "loss", "optimizer", "batch", "intervals", "dynamics")


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
        "Which weights learn; lora: low-rank adapters on a frozen model (docs/lora.md).",
        ("all", "lora"),
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
    eval_dataset_name: tuple[str, ...] = _field(
        (), "data", "Held-out pairs; empty: eval_fraction of dataset_name is held out."
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
        (), "data", "Behaviors whose chosen and rejected completions change places."
    )
    on_bad_rows: str = _field(
        "error",
        "data",
        "error: stop before training; drop: count and list them, go on.",
        ("error", "drop"),
    )
    max_length: int = _field(
        1024, "data", "Tokens of a prompt with one completion; longer ones lose their end.",
        within="length",
    )  # fmt: skip
    append_eos: str = _field(
        "auto",
        "data",
        "End completions with the EOS token; auto: string data yes, conversations no.",
        ("auto", "true", "false"),
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
    sync_ref_model: bool = _field(
        False, "loss", "The reference follows the policy (TR-DPO); a second model in memory."
    )
    ref_model_mixup_alpha: float = _field(
        0.6, "loss", "Part of the policy in the reference at every sync.", within="mixup"
    )
    ref_model_sync_steps: int = _field(
        512, "loss", "Steps between two syncs of the reference.", within="at least 1"
    )

    optim: str = _field("adamw_torch", "optimizer", "Optimizer.", ("adamw_torch", "sgd"))
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
        "Shape of the learning rate after the warm-up.",
        ("linear", "cosine", "constant"),
    )
    warmup_ratio: float = _field(
        0.1, "optimizer", "Part of all steps in which the rate rises from 0.", within="ratio"
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
        16384, "batch", "Packed tokens per forward: the memory dial; results do not depend on it.",
        within="at least 1",
    )  # fmt: skip
    stratify: bool = _field(
        False, "batch", "Every step draws from all behaviors and labels in their proportion."
    )
    shuffle: bool = _field(True, "batch", "A new order every epoch, decided by the seed alone.")

    logging_steps: int = _field(
        10, "intervals", "Steps between two lines of metrics.jsonl.", within="at least 1"
    )
    eval_steps: int = _field(
        50,
        "intervals",
        "Steps between two evaluations, step 0 and the last included; 0: none.",
        within="at least 0",
    )
    save_steps: int = _field(
        100,
        "intervals",
        "Steps between two checkpoints; the records' parts end at the same steps.",
        within="at least 1",
    )
    save_total_limit: int | None = _field(
        None, "intervals", "Checkpoints to keep, the newest ones; null: all.", within="at least 1"
    )

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
    ref_check_pairs: int = _field(
        8,
        "dynamics",
        "Cached reference log-probs that are computed again at the start and compared.",
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
            value = list(value) if isinstance(value, tuple) else value
            lines.append(yaml.safe_dump({spec.name: value}, allow_unicode=True, width=10**6))
        return "".join(lines)


def field_names() -> tuple[str, ...]:
    """Names of all fields of `Config`, in order."""
    return tuple(spec.name for spec in dataclasses.fields(Config))


@functools.cache
def field_types() -> dict[str, Any]:
    """Name -> resolved type: str, int, float, bool, one of them or None, tuple of str or float."""
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
    unsets an optional field. Raises ValueError naming file, line, key, what was expected and what
    came.
    """
    values: dict[str, Any] = {}
    where: dict[str, str] = {}
    if path is not None:
        for name, line, value in read_yaml(Path(path)):
            if name not in field_names():
                raise ValueError(f"{path}:{line}: {name}: {explain_unknown(name)}")
            if name in values:
                raise ValueError(f"{path}:{line}: {name} stands twice, first at {where[name]}")
            values[name], where[name] = value, f"{path}:{line}: {name}"
    for name, value in (overrides or {}).items():
        if name not in field_names():
            raise ValueError(f"--{name}: {explain_unknown(name)}")
        optional = types.NoneType in typing.get_args(field_types()[name])
        values[name] = None if optional and value == "null" else value
        where[name] = f"--{name}"
    try:
        return Config(**values)
    except ConfigError as error:
        place = where.get(error.field, error.field)
        raise ValueError(f"{place}: {error.reason}") from None
