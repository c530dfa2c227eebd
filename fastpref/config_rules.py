"""What must hold between the fields of a configuration, each rule with its remedy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastpref.config_lora import check_lora
from fastpref.config_loss import check_losses
from fastpref.config_values import ConfigError


def check_combinations(config: Any) -> None:
    """Raise ConfigError where fields of ``config``, a `fastpref.config.Config`, contradict."""
    device = config.device
    if device not in ("auto", "cpu", "cuda"):
        if not (device.startswith("cuda:") and device[5:].isdecimal()):
            raise ConfigError("device", f"expected auto, cpu, cuda or cuda:N, got {device!r}")
    both = sorted(set(config.dataset_name) & set(config.eval_dataset_name))
    # With different splits it may be a data set that has them; reading tells.
    if both and config.dataset_split == config.eval_dataset_split:
        raise ConfigError(
            "eval_dataset_name",
            f"{both[0]!r} is in dataset_name too, so it would not be held out; leave "
            "eval_dataset_name empty and set eval_fraction, name other files, or (where a data set "
            "has splits) give dataset_split and eval_dataset_split different ones",
        )
    check_losses(config)
    resume = config.resume_from_checkpoint
    if config.overwrite_output_dir and resume not in ("auto", "none"):
        if Path(os.path.abspath(resume)).is_relative_to(os.path.abspath(config.output_dir)):
            raise ConfigError(
                "overwrite_output_dir",
                f"true would remove the checkpoint {resume!r} that resume_from_checkpoint names; "
                "set overwrite_output_dir: false or another output_dir",
            )
    check_lora(config)
