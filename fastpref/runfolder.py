"""The folder of a run: whether a new one may begin there, which checkpoint it goes on from."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from fastpref import dist, lora, tracing
from fastpref.checkpoint import find_checkpoint, save_weights
from fastpref.config import Config, load_config
from fastpref.loggers import STATE_FILE, TENSORBOARD_FOLDER
from fastpref.model import PairModel

log = logging.getLogger(__name__)

# What a run may change when it goes on: where things lie, how long it lasts, what is kept. A change
# of anything else would make one record of two different runs.
MAY_CHANGE = {
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "device",
    "attn_implementation",  # the same numbers to rounding, as on another device
    "gradient_checkpointing",
    "torch_compile",  # to rounding too
    "peak_tflops",
    "profile",
    "max_steps",
    "num_train_epochs",
    "early_stopping_patience",
    "save_total_limit",
    "ref_cache_dir",
    "feature_cache_dir",
    "ref_check_pairs",
    "report_to",
    "run_name",
    "project",
    "logging_dir",
    "disable_tqdm",
    "save_merged",
    "dataset_num_proc",
    "token_cache_dir",
    "template_date",  # another day that matters changes the token ids, and those are compared
}
MERGED = "merged"  # folder of the model with its adapter added in
FOLDERS = ("records", TENSORBOARD_FOLDER, MERGED, tracing.FOLDER)
FILES = ("metrics.jsonl", "perf.jsonl", STATE_FILE, "report.html", "config.yaml")


def check(config: Config) -> None:
    """Raise ValueError where ``config.output_dir`` holds a run that this one may not go on with.

    Touches nothing, so that it can be asked long before `open_run`.
    """
    run = Path(config.output_dir)
    demand_writable(run)
    _demand_inputs_safe(config, run)
    if config.overwrite_output_dir:
        return
    if not (run / "config.yaml").exists():
        if any(run.glob("checkpoint-*")):
            raise ValueError(
                f"{run} holds checkpoints but no config.yaml, so what they belong to is not known. "
                "Set overwrite_output_dir to begin anew there, or choose another output_dir."
            )
        return
    if config.resume_from_checkpoint == "none":
        raise ValueError(
            f"{run} holds a run already. Set overwrite_output_dir to begin anew there, "
            "resume_from_checkpoint to auto to go on with it, or choose another output_dir."
        )
    _demand_same(config, load_config(run / "config.yaml"), run)


def demand_writable(folder: Path) -> None:
    """Raise ValueError where ``folder`` neither is a folder to write to nor can become one."""
    standing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not (standing.is_dir() and os.access(standing, os.W_OK | os.X_OK)):
        raise ValueError(
            f"output_dir={str(folder)!r} cannot be made or written: {standing} is not a "
            "folder that you may write to."
        )


def template_date(config: Config) -> str:
    """The day that chat templates get: as configured, that of the run to go on with, or today."""
    before = Path(config.output_dir) / "config.yaml"
    if config.template_date is None and before.exists() and not config.overwrite_output_dir:
        return load_config(before).template_date or datetime.date.today().isoformat()
    return config.template_date or datetime.date.today().isoformat()


def open_run(config: Config, device: torch.device) -> Path | None:
    """Prepare ``config.output_dir`` and write config.yaml; the checkpoint to go on from, or None.

    Raises ValueError as `check` does, and where a checkpoint is asked for that is not there or not
    whole.
    """
    found = ""
    if dist.is_main():
        check(config)
        run = Path(config.output_dir)
        checkpoint = None
        if config.overwrite_output_dir:
            _remove_run(run)
        else:
            checkpoint = find_checkpoint(config.resume_from_checkpoint, run)
        found = str(checkpoint or "")
        remove_final(run)
        run.mkdir(parents=True, exist_ok=True)
        aside = run / f".config.yaml.{os.getpid()}"
        aside.write_text(config.to_yaml(), encoding="utf-8")
        os.replace(aside, run / "config.yaml")
    found = dist.broadcast_text(found, device)
    return Path(found) if found else None


def _demand_inputs_safe(config: Config, run: Path) -> None:
    """Raise ValueError where the run would remove or replace what it starts from."""
    for field in ("model_name_or_path", "adapter_name_or_path", "ref_model_name_or_path"):
        name = getattr(config, field)
        source = Path(name or "").expanduser().resolve()
        if name is None or not source.is_relative_to(run.resolve()):
            continue
        inside = source.relative_to(run.resolve()).parts
        if not inside:
            where = f"is also {field}"
        elif inside[0] in FOLDERS or re.fullmatch(r"checkpoint-\d+", inside[0]):
            where = f"holds {field}={name!r} among the files of a run"
        else:
            continue
        what = field.removesuffix("_name_or_path").replace("ref_model", "reference")
        raise ValueError(
            f"output_dir={config.output_dir!r} {where}: this run would remove or replace the "
            f"{what} that it starts from. Choose another output_dir."
        )


def _demand_same(config: Config, before: Config, run: Path) -> None:
    changed = [
        f"{name}: {was!r} -> {now!r}"
        for name, was in dataclasses.asdict(before).items()
        for now in [getattr(config, name)]
        if name not in MAY_CHANGE and was != now
    ]
    if changed:
        raise ValueError(
            f"{run} holds a run with other settings ({'; '.join(changed)}). Choose another "
            "output_dir, or set overwrite_output_dir to remove that run and begin anew."
        )


def _remove_run(run: Path) -> None:
    """Only what a run writes; whatever else the user keeps there stays."""
    for folder in [
        *(run / name for name in FOLDERS),
        *run.glob("checkpoint-*"),
        *run.glob(".tmp-*"),
    ]:
        shutil.rmtree(folder, ignore_errors=True)
    for name in FILES:  # config.yaml last: without it, what is left could not be told apart
        (run / name).unlink(missing_ok=True)


def remove_final(run: Path) -> None:
    """The weights of a run that ended here: they would be taken for this one's until it ends.

    The settings go with them: a model and an adapter side by side are taken for one another's.
    """
    settings = [run / name for name in ("config.json", "generation_config.json", lora.SETTINGS)]
    for file in [*run.glob("model*.safetensors*"), run / lora.WEIGHTS, *settings]:
        file.unlink(missing_ok=True)
    for folder in [run / MERGED, *run.glob(".tmp-final-*")]:
        shutil.rmtree(folder, ignore_errors=True)


def save_final(run: Path, model: PairModel, merged: bool = False) -> None:
    """The trained model at the root of the run, for `AutoModelForCausalLM.from_pretrained(run)`;
    of LoRA the adapter, for `PeftModel.from_pretrained(base, run)`, and where ``merged`` the model
    with the adapter added in, in a folder of its own, after which ``model`` is of no more use.

    Written aside and moved file by file, each whole; the merged folder as one.
    """
    _save_aside(run, model.module, model.tokenizer)
    for file in sorted(_aside(run).iterdir()):
        os.replace(file, run / file.name)
    _aside(run).rmdir()
    log.info("%s saved to %s", "adapter" if model.adapter else "model", run)
    if merged and model.adapter:
        _save_aside(run, lora.merge(model.adapter), model.tokenizer)
        os.replace(_aside(run), run / MERGED)
        log.info("merged model saved to %s", run / MERGED)


def _aside(run: Path) -> Path:
    return run / f".tmp-final-{os.getpid()}"


def _save_aside(run: Path, module: Any, tokenizer: Any) -> None:
    save_weights(module, _aside(run))
    tokenizer.save_pretrained(_aside(run))
    umask = os.umask(0)
    os.umask(umask)
    for file in _aside(run).iterdir():
        file.chmod(0o666 & ~umask)  # safetensors writes files that only their owner can read
