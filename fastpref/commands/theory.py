"""Predict, before any training, which behaviors a preference set will teach a model first.

    fastpref theory fastpref-tiny my-pairs/
    fastpref theory MODEL a.jsonl b.jsonl --beta 0.01 --learning_rate 0.1 --output_dir runs/theory

Prints every behavior's distinguishability and its first rates, alone and in this mixture, and the
priority matrix; writes them as CSV, JSON and pictures. docs/theory-command.md explains them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpref.commands import add_field_options, show_log
from fastpref.config import Config, field_names, load_config, unplanned

if TYPE_CHECKING:
    from fastpref.data.tokenize import TokenPair
    from fastpref.frozen import FirstTokens
    from fastpref.model import PairModel
    from fastpref.theory.overview import Overview

# Fields of Config that decide what is predicted, with what differs from their default there: all
# pairs are looked at, and rates are per unit of time unless a learning rate is given.
OWN_DEFAULTS: dict[str, Any] = {
    "eval_fraction": "0",
    "learning_rate": None,
    # Without a backward there is no need for more, and larger tensors are slower on a CPU.
    "max_tokens_per_microbatch": "8192",
    "output_dir": "runs/theory",
}
OPTIONS = (
    *("model_revision", "dtype", "device", "dataset_weights", "dataset_split"),
    *("dataset_config_name", "behavior_column", "flip_behaviors", "on_bad_rows", "max_length"),
    *("truncation_mode", "chat_template", "template_date", "append_eos", "dataset_num_proc"),
    *("token_cache_dir", "eval_fraction", "seed", "beta", "learning_rate", "train_batch_size"),
    *("max_tokens_per_microbatch", "output_dir"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, DATASET, the fields of `Config` that matter here, and --compat."""
    parser.add_argument(
        "model_name_or_path", metavar="MODEL", help="folder, Hub name or fastpref-tiny"
    )
    parser.add_argument(
        "dataset_name", metavar="DATASET", nargs="+", help="files, folders, patterns or Hub names"
    )
    parser.add_argument(
        "--compat",
        choices=("double_norm",),
        help="double_norm: apply the final norm a second time, as the paper's code does",
    )
    add_field_options(parser, OPTIONS, OWN_DEFAULTS)


def run(args: argparse.Namespace) -> int:
    """Compute, print and write the prediction. Raises ValueError for what cannot be predicted."""
    show_log()
    given = {k: v for k, v in vars(args).items() if k in field_names()}
    learning_rate = given.pop("learning_rate", None)
    overrides = {k: v for k, v in OWN_DEFAULTS.items() if v is not None} | given
    if learning_rate not in (None, "null"):
        overrides["learning_rate"] = learning_rate
    config = unplanned(load_config(None, overrides))
    per_step = config.learning_rate if "learning_rate" in overrides else None

    from fastpref.report.files import write_whole
    from fastpref.report.theory_plots import write_plots
    from fastpref.report.theory_tables import overview_text, wrapped, write_tables

    view, about, notes = predict(config, per_step, double_norm=args.compat == "double_norm")
    print("\n".join(wrapped(f"{name}: {value}") for name, value in about.items()) + "\n")
    print(overview_text(view))
    print("\nNotes\n-----\n\n" + "\n".join(wrapped(f"- {note}") for note in notes))
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = [*write_tables(folder, view), *write_plots(folder, view)]
    settings = about | {"beta": view.beta, "learning_rate": view.learning_rate}
    summary = {"settings": settings, "mixture": asdict(view.mixture), "notes": notes}
    write_whole(folder / "theory.json", (json.dumps(summary, indent=1) + "\n").encode())
    print("\n" + wrapped(f"written to {folder}: theory.json, {', '.join(f.name for f in files)}"))
    return 0


def predict(
    config: Config, learning_rate: float | None, double_norm: bool = False
) -> tuple[Any, dict[str, Any], list[str]]:
    """The overview, what it was made of, and the notes that belong to it.

    Raises ValueError where the data or the model allow no prediction.
    """
    from fastpref.data.dataset import load_dataset
    from fastpref.frozen import demand_head, freeze
    from fastpref.loading import load_model
    from fastpref.theory.overview import overview

    model = load_model(config)
    demand_head(model)
    dataset = load_dataset(config, model.tokenizer)
    found = freeze(
        model,
        dataset,
        dataset.train,
        config,
        weigh=True,
        double_norm=double_norm,
        progress=not config.disable_tqdm,
    )
    pairs, frozen = found.firsts.pairs, found.pairs
    weighed = len(set(config.dataset_weights)) > 1
    positive = _positive_token(pairs)
    view = overview(
        frozen,
        config.beta,
        learning_rate,
        batch_size=0 if weighed else config.train_batch_size,  # (E13) takes each pair once
        positive_token=positive,
        linear=model.head.softcap is None,
    )
    about = {
        "model": config.model_name_or_path,
        "data": ", ".join(config.dataset_name),
        "pairs": len(pairs),
        "behaviors": len(frozen.behaviors),
        "features": f"{frozen.features.shape[1]} wide, computed in {str(model.dtype)[6:]}, "
        f"final norm {'twice (double_norm)' if double_norm else 'once'}",
    }
    return view, about, _notes(model, found.firsts, view, positive, double_norm)


def _positive_token(pairs: Sequence[TokenPair]) -> int | None:
    """The token of "Yes" where the data are Yes/No pairs throughout, else None."""
    yes = {int(pair.chosen[0]) for pair in pairs if pair.label == "Yes"}
    yes |= {int(pair.rejected[0]) for pair in pairs if pair.label == "No"}
    if len(yes) != 1:
        return None
    token = yes.pop()
    asked = all(token in (pair.chosen[0], pair.rejected[0]) for pair in pairs)
    return token if asked else None


def _notes(
    model: PairModel,
    firsts: FirstTokens,
    view: Overview,
    positive: int | None,
    double_norm: bool,
) -> list[str]:
    """What holds exactly, what does not, and how the numbers are to be read."""
    total = len(firsts.pairs)
    notes = [
        "Rates are those of the first moment of plain SGD on the output head alone, the rest "
        "frozen, from the reference. With AdamW, LoRA or full training delta, levels and shares "
        "still say how the head's gradient begins; the rates are not the run's (docs/theory.md, "
        "section 10).",
        *_answer_notes(firsts, total),
    ]
    if firsts.without:
        notes.append(
            f"{len(firsts.without)} pairs without a first differing token are left out (on_bad_rows"
            " drop)."
        )
    if positive is None:
        notes.append("mu.d takes as + the answer of a behavior whose token has the smaller id.")
    else:
        text = model.tokenizer.decode([positive])
        notes.append(f"mu.d takes as + the answer {text!r} (token {positive}).")
    notes += _view_notes(view)
    head = model.head
    if head.softcap is not None:
        notes.append(
            f"The model caps its logits at {head.softcap:g}, so margins are not linear in the head:"
            " rates, levels, shares and coherence are undefined. Delta and the other statistics, "
            "and the priority matrix made of them, are those of its features."
        )
    if head.weight is model.module.get_input_embeddings().weight:  # type: ignore[operator]
        notes.append(
            "The head is also the input embedding: training it moves the features, and only the "
            "head's own part of the first rate is predicted."
        )
    if head.bias is not None:
        notes.append("The head has a bias; what it adds where it is trained is not in the rates.")
    if double_norm:
        notes.append(
            "The final norm was applied twice, as the paper's code does: the numbers compare with "
            "its own, and are not those of the model that is trained."
        )
    return notes


def _answer_notes(firsts: FirstTokens, total: int) -> list[str]:
    notes = []
    if firsts.shared_start:
        notes.append(
            f"In {firsts.shared_start} of {total} pairs the answers begin with the same token or "
            "tokens. These count as the end of the prompt and the first token that differs as the "
            "answer, which is exact: what both answers share cancels in the margin."
        )
    if not firsts.longer:
        notes.append("Every answer ends with its first differing token, so margins are exact.")
        return notes
    by_eos = (
        f" ({firsts.ended} of them by the EOS token alone, which --append_eos false leaves out)"
        if firsts.ended
        else ""
    )
    notes.append(
        f"In {firsts.longer} of {total} pairs an answer goes on behind the first token in which "
        f"they differ{by_eos}. All that is said here is exact for that token. The margins of "
        "training also hold the later ones, whose features are each answer's own: of them nothing "
        "is said."
    )
    return notes


def _view_notes(view: Overview) -> list[str]:
    notes = []
    known = [own.statistics for own in view.behaviors]
    several = [s for s in known if np.isnan(s.delta)]
    if several:
        notes.append(
            f"{len(several)} of {len(known)} behaviors have pairs with more than one couple of "
            "answers: delta, concentration, trace and mu.d are undefined there (-). Effective "
            "delta and the rates take any answers."
        )
    apart = [abs(s.effective_delta / s.delta - 1) for s in known if s.delta > 0]
    if apart and max(apart) > 0.01:
        notes.append(
            f"In {sum(a > 0.01 for a in apart)} of {len(known)} behaviors labels do not balance: "
            f"effective delta, the one in the rates, is up to {100 * max(apart):.0f} % off delta."
        )
    return notes
