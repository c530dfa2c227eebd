"""What a user names as a model, as the fields of `Config` that load it: a model, an adapter's
folder, a run, or a checkpoint of one."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpref import lora
from fastpref.checkpoint import verify_checkpoint
from fastpref.config import Config, load_config
from fastpref.losses import get_loss

# Fields that a run's own config.yaml answers: what its loss is, how its pairs become tokens.
INHERITED = (
    *("loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence_type"),
    *("f_alpha_divergence_coef", "ld_alpha", "use_weighting", "discopop_tau", "simpo_gamma"),
    *("cpo_alpha", "rpo_alpha", "max_length", "truncation_mode", "chat_template"),
    *("template_date", "append_eos", "dtype", "seed", "trainable"),
)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Origin:
    """Fields of `Config`, and what there is to say of where they come from."""

    fields: dict[str, Any]
    note: str | None = None
    step: int | None = None  # of the run's optimizer, where it is known


def find_origin(name: str) -> Origin:
    """The fields that load what ``name`` says.

    A run is its final weights, or its newest whole checkpoint; its reference is what it had: the
    model that it began from, or the one that it names. Raises ValueError for a run without weights,
    a damaged checkpoint, and an adapter that does not say what it was made on.
    """
    path = Path(name).expanduser()
    if (path / "config.yaml").is_file():
        return _of_run(path, None)
    if _CHECKPOINT.fullmatch(path.name) and (path.parent / "config.yaml").is_file():
        if not path.is_dir():
            raise ValueError(f"{path}: no such checkpoint; there are: {_listed(path.parent)}")
        return _of_run(path.parent, path)
    if (path / lora.SETTINGS).is_file():
        return Origin(_adapted(path))
    return Origin({"model_name_or_path": name})


def _of_run(run: Path, checkpoint: Path | None) -> Origin:
    before = load_config(run / "config.yaml")
    folder = checkpoint or _newest(run, before)
    found = _CHECKPOINT.fullmatch(folder.name)
    if found:
        verify_checkpoint(folder)
    fields = {field: getattr(before, field) for field in INHERITED}
    what = f"step {found[1]} of {run}" if found else f"final weights of {run}"
    if before.trainable == "lora":
        fields |= {
            "model_name_or_path": before.model_name_or_path,
            "model_revision": before.model_revision,
            "adapter_name_or_path": str(folder),
            "adapter_reference": "base",
        }
        if before.adapter_name_or_path and before.adapter_reference != "base":
            what += "; its reference, the adapter that it continued, is taken to be the base model"
    else:
        fields["model_name_or_path"] = str(folder)
    if before.ref_model_name_or_path:
        fields["ref_model_name_or_path"] = before.ref_model_name_or_path
        fields["ref_model_revision"] = before.ref_model_revision
    elif before.trainable != "lora" and get_loss(before.loss_type).needs_reference:
        fields["ref_model_name_or_path"] = before.model_name_or_path
        fields["ref_model_revision"] = before.model_revision
    return Origin(fields, what, int(found[1]) if found else None)


def _newest(run: Path, before: Config) -> Path:
    """The folder of a run's weights: its own where it ended, else its last checkpoint."""
    ended = run / lora.WEIGHTS if before.trainable == "lora" else run / "config.json"
    if ended.is_file():
        return run
    numbers = [int(found[1]) for found in map(_CHECKPOINT.fullmatch, _names(run)) if found]
    if not numbers:
        raise ValueError(
            f"{run} is a run without weights: no final model, no checkpoint. Wait for its first "
            "checkpoint (save_steps), or name the model that it trains."
        )
    return run / f"checkpoint-{max(numbers)}"


def _names(run: Path) -> list[str]:
    return [folder.name for folder in run.iterdir() if folder.is_dir()]


def _listed(run: Path) -> str:
    found = [name for name in _names(run) if _CHECKPOINT.fullmatch(name)]
    return ", ".join(sorted(found, key=lambda name: int(name.split("-")[1]))) or "none"


def _adapted(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / lora.SETTINGS).read_text(encoding="utf-8"))
        base = settings.get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder / lora.SETTINGS}: not the settings of an adapter: {error}"
        ) from None
    if not base:
        raise ValueError(
            f"{folder / lora.SETTINGS} does not say which model the adapter was made on "
            "(base_model_name_or_path). Give that model as MODEL and this folder as "
            "--adapter_name_or_path."
        )
    return {
        "model_name_or_path": base,
        "adapter_name_or_path": str(folder),
        "trainable": "lora",
        "adapter_reference": "base",
    }
