"""What must hold between the fields of a configuration, each rule with its remedy."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

from fastpref.config_lora import check_lora
from fastpref.config_loss import check_losses
from fastpref.config_options import LR_SCHEDULER_KWARGS, OPTIM_ARGS, check_options
from fastpref.config_values import ConfigError
from fastpref.loss_table import TABLE
from fastpref.probe_types import PROBE_TYPES

LOGGERS = ("tensorboard", "wandb", "trackio")
EVAL_SET = re.compile(r"([A-Za-z0-9_.-]+)=(.+)", re.DOTALL)


def eval_set(entry: str) -> tuple[str, str]:
    """Name and path of an entry of `eval_dataset_name`, ``name=path``; a bare path has name ""."""
    match = EVAL_SET.fullmatch(entry)
    # A folder may be called split=test: what exists is a path.
    if match and not os.path.exists(os.path.expanduser(entry)):
        return match[1], match[2]
    return "", entry


def check_combinations(config: Any) -> None:
    """Raise ConfigError where fields of ``config``, a `fastpref.config.Config`, contradict."""
    device = config.device
    if device not in ("auto", "cpu", "cuda"):
        if not (device.startswith("cuda:") and device[5:].isdecimal()):
            raise ConfigError("device", f"expected auto, cpu, cuda or cuda:N, got {device!r}")
    weights, names = config.dataset_weights, config.dataset_name
    if weights and len(weights) != len(names):
        raise ConfigError(
            "dataset_weights",
            f"expected one number for each of the {len(names)} entries of dataset_name, in their "
            f"order, got {len(weights)}",
        )
    held_out = {eval_set(entry)[1] for entry in config.eval_dataset_name}
    both = sorted(set(config.dataset_name) & held_out)
    # With different splits it may be a data set that has them; reading tells.
    if both and config.dataset_split == config.eval_dataset_split:
        raise ConfigError(
            "eval_dataset_name",
            f"{both[0]!r} is in dataset_name too, so it would not be held out; leave "
            "eval_dataset_name empty and set eval_fraction, name other files, or (where a data set "
            "has splits) give dataset_split and eval_dataset_split different ones",
        )
    check_losses(config)
    check_lora(config)
    _check_reference(config)
    resume = config.resume_from_checkpoint
    if config.overwrite_output_dir and resume not in ("auto", "none"):
        if Path(os.path.abspath(resume)).is_relative_to(os.path.abspath(config.output_dir)):
            raise ConfigError(
                "overwrite_output_dir",
                f"true would remove the checkpoint {resume!r} that resume_from_checkpoint names; "
                "set overwrite_output_dir: false or another output_dir",
            )
    _check_precision(config)
    _check_compile(config)
    _check_optimizer(config)
    _check_best(config)
    _check_probes(config)
    for name in config.report_to:
        if name not in LOGGERS:
            apart = "name several as a list, without commas on the command line"
            raise ConfigError(
                "report_to",
                f"expected {', '.join(LOGGERS)} (one or several) or none alone, got {name!r}; "
                + (apart if "," in name else "metrics.jsonl in output_dir is written in any case"),
            )


def _check_reference(config: Any) -> None:
    named, revision = config.ref_model_name_or_path, config.ref_model_revision
    if named is None:
        if revision is not None:
            raise ConfigError(
                "ref_model_revision",
                f"{revision!r} is one of ref_model_name_or_path, which is not set",
            )
        return
    if not any(TABLE[name].needs_reference for name in config.loss_type):
        raise ConfigError(
            "ref_model_name_or_path",
            f"loss_type {', '.join(config.loss_type)} has no reference; remove it",
        )
    if config.sync_ref_model:
        raise ConfigError(
            "ref_model_name_or_path",
            "sync_ref_model moves the model as it begins towards the one that is trained, and has "
            "no place for another; remove one of the two",
        )
    if config.adapter_reference != "initial":
        raise ConfigError(
            "adapter_reference",
            f"{config.adapter_reference} contradicts ref_model_name_or_path; remove one of the two",
        )


def _check_precision(config: Any) -> None:
    if config.weights_dtype == "bfloat16":
        if config.dtype not in ("auto", "bfloat16"):
            raise ConfigError(
                "weights_dtype",
                f"bfloat16 weights have no products in dtype: {config.dtype}; set dtype: bfloat16 "
                "or weights_dtype: float32",
            )
    elif not config.master_weights:
        raise ConfigError(
            "master_weights", "false is for weights_dtype: bfloat16; remove one of the two"
        )


def _check_compile(config: Any) -> None:
    if not config.torch_compile:
        return
    remedy = "set torch_compile: false"
    if config.track in ("sketch", "exact"):
        raise ConfigError(
            "torch_compile",
            f"track: {config.track} puts taps into the layers, which a compiled block does not "
            f"call one by one; {remedy}, or track: head",
        )
    if config.gradient_checkpointing in ("selective", "auto"):
        raise ConfigError(
            "torch_compile",
            f"gradient_checkpointing: {config.gradient_checkpointing} keeps single results of a "
            f"block, which a compiled one does not show; {remedy}, or gradient_checkpointing: "
            "full or none",
        )
    if config.trainable == "head":
        raise ConfigError("torch_compile", f"trainable: head computes no block; {remedy}")


def _check_optimizer(config: Any) -> None:
    args = dict(config.optim_args)
    check_options("optim_args", config.optim, config.optim_args, OPTIM_ARGS[config.optim])
    if args.get("nesterov") and (not args.get("momentum") or args.get("dampening")):
        raise ConfigError("optim_args", "nesterov needs a momentum above 0 and no dampening")

    kind, kwargs = config.lr_scheduler_type, dict(config.lr_scheduler_kwargs)
    known = LR_SCHEDULER_KWARGS[kind]
    check_options("lr_scheduler_kwargs", kind, config.lr_scheduler_kwargs, known)
    if "min_lr_rate" in known and ("min_lr" in kwargs) == ("min_lr_rate" in kwargs):
        raise ConfigError(
            "lr_scheduler_kwargs",
            f"{kind} needs one of min_lr (a learning rate) and min_lr_rate (a part of "
            "learning_rate), for example min_lr_rate=0.1",
        )
    end = kwargs.get("lr_end", 1e-7) if kind == "polynomial" else kwargs.get("min_lr", 0.0)
    name = "lr_end" if kind == "polynomial" else "min_lr"
    divides = kind == "polynomial" or ("min_lr" in kwargs and config.learning_rate == 0)
    if end > config.learning_rate or (divides and end == config.learning_rate):
        raise ConfigError(
            "lr_scheduler_kwargs",
            f"{name} is {end:g}, not below learning_rate, {config.learning_rate:g}; set {name} "
            "to less",
        )
    if config.warmup_steps is not None and config.warmup_ratio is not None:
        raise ConfigError(
            "warmup_steps", "warmup_ratio is set too; set one of them and remove the other"
        )


def _check_probes(config: Any) -> None:
    for name in config.probe_types:
        if name not in PROBE_TYPES:
            near = difflib.get_close_matches(name, PROBE_TYPES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            apart = "; name several as a list, without commas on the command line"
            raise ConfigError(
                "probe_types",
                f"expected some of {', '.join(PROBE_TYPES)}, got {name!r}"
                + (apart if "," in name else hint)
                + " (a file of probes may have types of its own)",
            )
    if config.probes and not config.probe_every:
        raise ConfigError("probes", "are scored never, as probe_every is 0; set probe_every")
    if config.probe_influence:
        if not config.probe_every:
            raise ConfigError("probe_influence", "there are no probes; set probe_every")
        if config.track not in ("sketch", "exact"):
            raise ConfigError(
                "probe_influence",
                f"needs gradients of every pair, and track is {config.track}; set track: sketch",
            )
        if not config.record:
            raise ConfigError("probe_influence", "is written to records/; set record: true")
    none = not config.probes and not (config.probe_types and config.probe_prompts)
    if config.probe_every and none:
        empty = "probe_prompts" if not config.probe_prompts else "probe_types"
        raise ConfigError("probe_every", f"there is no probe: {empty} is empty; set it, or probes")


def _check_best(config: Any) -> None:
    if config.best_metric is None or config.eval_steps:
        return
    for name in ("early_stopping_patience", "load_best_model_at_end", "metric_for_best_model"):
        if getattr(config, name):
            raise ConfigError(name, "needs evaluations, and eval_steps is 0; set eval_steps")
