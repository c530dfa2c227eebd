"""States of the random generators of every rank, as tensors that a checkpoint can hold."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fastpref import dist

log = logging.getLogger(__name__)

_Numpy = tuple[str, np.ndarray, int, int, float]  # what numpy's legacy get_state gives


def own_generators(device: torch.device) -> dict[str, Tensor]:
    """State of this rank's random generators, by name, on the CPU."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = cast(_Numpy, np.random.get_state(legacy=True))
    own = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([np.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    return own


def set_generators(own: dict[str, Tensor]) -> None:
    """Put this rank's generators where `own_generators` found them."""
    torch.set_rng_state(own["torch"])
    version, *words = own["python"].tolist()
    gauss = float(own["python_gauss"])
    random.setstate((version, tuple(words), None if np.isnan(gauss) else gauss))
    *keys, position, has_gauss = own["numpy"].tolist()
    cached = float(own["numpy_gauss"])
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, cached))
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])


def gather_generators(device: torch.device) -> dict[str, Tensor]:
    """State of every rank's random generators as "rank<r>.<generator>" tensors on the CPU."""
    gathered: dict[str, Tensor] = {}
    for key, tensor in own_generators(device).items():
        for rank, part in enumerate(dist.all_gather(tensor.to(device))):
            gathered[f"rank{rank}.{key}"] = part.cpu()
    return gathered


def restore_generators(saved: dict[str, Tensor], folder: Path) -> None:
    """Set this rank's generators to the states that were gathered; they came from ``folder``."""
    prefix = f"rank{dist.rank()}."
    own = {key.removeprefix(prefix): t for key, t in saved.items() if key.startswith(prefix)}
    if not own:
        log.warning(
            "%s: saved by fewer ranks; rank %d's generators start anew", folder, dist.rank()
        )
        return
    set_generators(own)
