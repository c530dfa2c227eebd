"""`trainable: head`: the output head learns, the body stays as it is.

With frozen hidden states and one-token answers this is the setting of Im & Li (arXiv 2403.18742),
where the whole trajectory can be computed beside the run (docs/head.md).
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from torch import nn

from fastpref.model import PairModel

log = logging.getLogger(__name__)


def freeze_body(model: PairModel) -> PairModel:
    """``model`` with its head's weight, and bias if it has one, as all that learns; in place.

    A head that is tied to the input embedding becomes a copy of its own, and the configuration says
    so, so that the trained model loads as any other. Raises ValueError where the head is not a
    linear layer of parameters.
    """
    module: Any = model.module
    layer = module.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"trainable: head needs a linear output head; {type(module).__name__} has "
            f"{type(layer).__name__}. Set trainable: all."
        )
    body = list(module.base_model.parameters())
    tied = any(own is shared for own in layer.parameters() for shared in body)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    if tied:
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        for config in (module.config, module.config.get_text_config()):
            config.tie_word_embeddings = False
        module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)
        log.info("the head was tied to the embedding; it is a copy of its own from here on")
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    learns = sum(parameter.numel() for parameter in layer.parameters())
    log.info("trainable: head, %d of the model's numbers learn", learns)
    return dataclasses.replace(model, frozen_body=True)
