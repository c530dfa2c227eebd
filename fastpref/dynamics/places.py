"""Trained weights as taps know them."""

from __future__ import annotations

from dataclasses import dataclass

from fastpref_kernels.count_sketch import BUCKETS
from torch import nn


@dataclass(frozen=True, eq=False)
class Place:
    """A trained weight: its group, and under which projections its sketches are made."""

    name: str
    parameter: nn.Parameter
    group: int
    key: str
    transposed: bool = False
    first_output: int = 0
    buckets: int | None = None


class VocabularyPlace(Place):
    """Of an embedding or a head, whose outputs are a vocabulary."""

    @staticmethod
    def plain(name: str, parameter: nn.Parameter, group: int) -> VocabularyPlace:
        return VocabularyPlace(name, parameter, group, name)

    @staticmethod
    def hashed(name: str, parameter: nn.Parameter, group: int) -> VocabularyPlace:
        """As `linear_logprob` sketches a head."""
        return VocabularyPlace(name, parameter, group, name, buckets=BUCKETS)
