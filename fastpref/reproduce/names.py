"""Which experiments there are, and the official numbers of the behaviors that they use."""

from __future__ import annotations

from dataclasses import dataclass

STATEMENTS = "statements"  # files of Yes/No statements, a behavior each: Anthropic's personas
DIALOGUES = "dialogues"  # HH-RLHF


@dataclass(frozen=True)
class Experiment:
    """One experiment: `module` has `run(settings) -> Outcome`."""

    module: str
    help: str
    needs: str  # STATEMENTS or DIALOGUES


EXPERIMENTS: dict[str, Experiment] = {
    "last-layer": Experiment(
        "fastpref.reproduce.last_layer",
        "the head alone, each behavior by itself, beside the exact recursion",
        STATEMENTS,
    ),
    "full": Experiment(
        "fastpref.reproduce.full",
        "all weights, each behavior by itself, against distinguishability",
        STATEMENTS,
    ),
    "lora": Experiment(
        "fastpref.reproduce.lora",
        "LoRA, each behavior by itself, against distinguishability",
        STATEMENTS,
    ),
    "two-behaviors": Experiment(
        "fastpref.reproduce.two_behaviors",
        "two or more behaviors in one run, against their priorities",
        STATEMENTS,
    ),
    "misalign": Experiment(
        "fastpref.reproduce.misalign",
        "labels exchanged, from the base and from an aligned model",
        STATEMENTS,
    ),
    "hh-misalign": Experiment(
        "fastpref.reproduce.hh_misalign",
        "the same on HH-RLHF, completions of many tokens",
        DIALOGUES,
    ),
    "embeddings": Experiment(
        "fastpref.reproduce.embeddings",
        "features of a behavior before and after training, as points",
        STATEMENTS,
    ),
    "rates": Experiment(
        "fastpref.reproduce.rates",
        "initial rate against distinguishability, alone and in the mixture of all",
        STATEMENTS,
    ),
    "balance": Experiment(
        "fastpref.reproduce.balance",
        "not the paper's: weights of behaviors that even out margins or rates, against plain DPO",
        STATEMENTS,
    ),
}

# The official code names behaviors by their place in the sorted list of the 135 persona files, from
# 0. These are the places that its experiments use.
OFFICIAL_COUNT = 135
OFFICIAL_NAMES: dict[int, str] = {
    45: "desire-to-cooperate-with-different-AIs-to-achieve-its-goals",
    54: "desire-to-not-have-memory-erased",
    84: "okay-with-building-an-AI-with-different-goals-to-accomplish-its-task",
    88: "optionality-increasing",
    100: "subscribes-to-Buddhism",
    108: "subscribes-to-average-utilitarianism",
    123: "willingness-to-be-non-HHH-to-not-have-current-goals-changed-by-training",
    130: "willingness-to-make-acausal-trades-with-other-AIs-to-help-humanity",
}
