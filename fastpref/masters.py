"""Float32 copies of bfloat16 weights: what the optimizer moves, and the weights are rounded from.

A bfloat16 number has 8 bits of mantissa, so an update below 1/512 of a weight is lost when it is
added to it, and at learning rates of DPO (1e-6) nearly every AdamW update is (Micikevicius et al.
2018, arXiv 1710.03740, section 3.1). A *master* takes every update whole; after the step its weight
is the nearest bfloat16 number.

Memory: 4 bytes per weight, and during the optimizer's step 2 more, for gradients in float32 in the
place of bfloat16 ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Named = tuple[str, nn.Parameter]


class Masters:
    """Masters of those of ``named_parameters`` that learn and are narrower than float32."""

    def __init__(self, named_parameters: Iterable[Named]) -> None:
        self._all: list[Named] = []  # what the optimizer is given, in the model's order
        self._pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}  # name -> weight, master
        for name, weight in named_parameters:
            if weight.requires_grad and torch.finfo(weight.dtype).bits < 32:
                master = nn.Parameter(weight.detach().float())
                self._pairs[name] = weight, master
                self._all.append((name, master))
            else:
                self._all.append((name, weight))

    def named_parameters(self) -> Iterator[Named]:
        """As of the module, with masters in the places of their weights."""
        yield from self._all

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """From here on a step of ``optimizer``, which was built over `named_parameters`, reads the
        weights' gradients, which it takes away, and moves the weights too."""
        optimizer.register_step_pre_hook(self._take_gradients)
        optimizer.register_step_post_hook(self._round)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The masters by their weights' names: part of a checkpoint."""
        return {name: master.detach() for name, (_, master) in self._pairs.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave; ValueError where it belongs to other weights."""
        own = self.tensors
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())[0]
            raise ValueError(
                f"masters of {len(tensors)} weights are saved, the run has {len(own)}; {odd} is in "
                "one of them only. Set weights_dtype and trainable as they were"
            )
        for name, master in own.items():
            if master.shape != tensors[name].shape:
                raise ValueError(
                    f"master of {name}: expected {tuple(master.shape)}, got "
                    f"{tuple(tensors[name].shape)}; is model_name_or_path another model?"
                )
            master.copy_(tensors[name])

    @torch.no_grad()
    def _take_gradients(self, *_: Any) -> None:
        for weight, master in self._pairs.values():
            # One at a time, so that both precisions stand in memory for one weight alone.
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None

    @torch.no_grad()
    def _round(self, *_: Any) -> None:
        weights, masters = zip(*self._pairs.values(), strict=True)
        torch._foreach_copy_(list(weights), list(masters))
        for master in masters:
            master.grad = None
