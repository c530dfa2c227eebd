"""Profile a model's gradients on preference pairs, without training it.

    fastpref profile fastpref-tiny my-pairs/
    fastpref profile runs/mine/checkpoint-100 my-pairs/ --track exact --displacement
    fastpref profile MODEL my-pairs/ --track head --sample 0

MODEL is a folder, a Hub name, fastpref-tiny, the folder of an adapter, a run, or a checkpoint of a
run, which brings its loss and its reference along. Prints norms, coherence, shares and who teaches
whom; writes records, a summary and a page. docs/profile.md explains them. No weight is changed.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpref.commands import add_field_options, show_log
from fastpref.config import Config, field_names, load_config, unplanned

if TYPE_CHECKING:
    from fastpref.data.dataset import Dataset
    from fastpref.origin import Origin
    from fastpref.profile import Profile
    from fastpref.report.profile_tables import ProfileView

OWN_DEFAULTS: dict[str, Any] = {"eval_fraction": "0", "learning_rate": None}
TRACKS = {
    "head": "of the output head alone",
    "sketch": "of all trained weights, from sketches",
    "exact": "of all trained weights, norms exact, Gamma from sketches",
}
OPTIONS = (
    *("sketch_dim", "seed", "max_tokens_per_microbatch", "dtype", "device"),
    *("model_revision", "adapter_name_or_path", "adapter_reference", "trainable"),
    *("ref_model_name_or_path", "ref_model_revision", "ref_cache_dir", "loss_type", "loss_weights"),
    *("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha"),
    *("use_weighting", "discopop_tau", "simpo_gamma", "cpo_alpha", "rpo_alpha", "learning_rate"),
    *("dataset_split", "dataset_config_name", "behavior_column", "flip_behaviors", "on_bad_rows"),
    *("max_length", "truncation_mode", "chat_template", "template_date", "append_eos"),
    *("dataset_num_proc", "token_cache_dir", "eval_fraction", "disable_tqdm"),
)
log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, DATASET, what is looked at, and the fields of `Config` that matter here."""
    parser.add_argument("model", metavar="MODEL", help="folder, Hub name, fastpref-tiny or run")
    parser.add_argument(
        "dataset_name", metavar="DATASET", nargs="+", help="files, folders, patterns or Hub names"
    )
    parser.add_argument(
        "--track",
        dest="tier",  # Config's own field says what a run records
        default="sketch",
        choices=list(TRACKS),
        help="gradients of the head alone (quick), sketches of all, or exact norms too [sketch]",
    )
    parser.add_argument(
        "--sample", type=int, default=64, metavar="N", help="pairs per behavior, 0 for all [64]"
    )
    parser.add_argument(
        "--displacement",
        action="store_true",
        help="also the gradients of both completions' log-probs: will the chosen one's fall?",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/profile"), help="folder to write [runs/profile]"
    )
    add_field_options(parser, OPTIONS, OWN_DEFAULTS)


def run(args: argparse.Namespace) -> int:
    """Compute, print and write the profile. Raises ValueError for what cannot be profiled."""
    if args.sample < 0:
        raise ValueError(f"--sample {args.sample}: expected a number of pairs, or 0 for all")
    demand_free(args.out)
    show_log()
    from fastpref.origin import find_origin

    origin = find_origin(args.model)
    config = configuration(origin, vars(args))
    given = "learning_rate" in vars(args)
    view, found, dataset = look(config, origin, args, config.learning_rate if given else None)

    from fastpref.report.profile_page import write_profile_page
    from fastpref.report.profile_tables import profile_text

    print("\n".join(f"{name}: {value}" for name, value in view.settings.items()) + "\n")
    print(profile_text(view))
    print("\nNotes\n-----\n" + "\n".join(f"- {note}" for note in view.notes))
    args.out.mkdir(parents=True, exist_ok=True)
    write_records(args.out, found, dataset, config)
    write_summary(args.out, view)
    files = write_profile_page(args.out, view)
    names = ", ".join(file.name for file in files)
    print(f"\nwritten to {args.out}: profile.json, records, {names}")
    return 0


def demand_free(folder: Path) -> None:
    """Raise ValueError where ``folder`` holds a run, whose records would be replaced."""
    from fastpref.runfolder import demand_writable

    demand_writable(folder)
    if (folder / "config.yaml").exists() or (folder / "metrics.jsonl").exists():
        raise ValueError(
            f"--out {folder} holds a run, whose records this would replace; choose another folder."
        )


def configuration(origin: Origin, given: Mapping[str, Any]) -> Config:
    """The fields that the model brings, under those of the command line."""
    own = {name: value for name, value in given.items() if name in field_names()}
    defaults = {name: value for name, value in OWN_DEFAULTS.items() if value is not None}
    defaults["output_dir"] = "runs/profile"
    fields = {name: value for name, value in origin.fields.items() if value is not None}
    merged = defaults | fields | own
    if "adapter_name_or_path" in merged:
        merged.setdefault("trainable", "lora")
    return unplanned(load_config(None, merged))


def look(
    config: Config, origin: Origin, args: argparse.Namespace, learning_rate: float | None
) -> tuple[ProfileView, Profile, Dataset]:
    """What there is to show, what it was made of, and the data."""
    import dataclasses
    import functools

    from fastpref.data.dataset import load_dataset
    from fastpref.data.pack import fed_tokens, pack_pairs
    from fastpref.head import freeze_body
    from fastpref.loading import load_model, load_tokenizer
    from fastpref.profile import profile
    from fastpref.selfcheck import check_model

    progress = not config.disable_tqdm
    track = "head" if config.trainable == "head" else args.tier  # where nothing else learns
    tokenizer = load_tokenizer(config)
    dataset = load_dataset(config, tokenizer, progress)
    model = load_model(config, tokenizer)
    if config.trainable == "head":
        model = freeze_body(model)
    worst = check_model(model, dataset.train, config.max_tokens_per_microbatch)
    log.info("self-check: packed equals separate sequences to %.1e", worst)
    # Frozen states are not cached here: a profile passes over its pairs once.
    dataset = dataclasses.replace(dataset, sizes=fed_tokens)
    if model.router:
        dataset = dataclasses.replace(
            dataset,
            sizes=functools.partial(fed_tokens, whole=True),
            pack=functools.partial(pack_pairs, whole=True),
        )
    found = profile(
        config,
        model,
        dataset,
        track=track,
        sample=args.sample,
        displacement=args.displacement,
        learning_rate=learning_rate,
        progress=progress,
    )
    settings = {
        "model": args.model + (f" ({origin.note})" if origin.note else ""),
        "data": ", ".join(config.dataset_name),
        "behaviors": len(found.behaviors),
        "pairs": f"{len(found.pairs['pair_id']):,} looked at of {int(found.whole.sum()):,}",
        "gradients": f"{TRACKS[track]}, in {str(model.dtype)[6:]}",
        "loss": f"{'+'.join(config.loss_type)}, beta {config.beta:g}",
        "reference": found.reference,
    }
    return make_view(found, settings, config, learning_rate), found, dataset


def make_view(
    found: Profile, settings: dict[str, Any], config: Config, learning_rate: float | None
) -> ProfileView:
    """The profile as tables and pictures take it, fastest behavior first."""
    from fastpref.report.profile_tables import ProfileView

    names = dict.fromkeys(name for row in found.rows for name in row if name != "behavior")
    columns = {
        name: np.array([math.nan if row.get(name) is None else row[name] for row in found.rows])
        for name in names
    }
    columns |= {"whole": found.whole.astype(float)}
    for name in ("share", "rate", "chosen_rate"):
        if name in found.estimates:
            scale = 1.0 if name == "share" else learning_rate or 1.0
            value, error = (x * scale for x in found.estimates[name])
            columns |= {name: value, f"{name}_error": error}
    if found.displaced is not None:
        columns["displaced"] = found.displaced
    if "gnorm_m" not in columns:
        columns["gnorm_m"] = columns["head_gnorm_m"]
    noise = (float(found.noise.value), float(found.noise.error))
    return ProfileView(
        settings,
        found.behaviors,
        found.groups,
        columns,
        found.group_norm,
        found.group_norm_error,
        *found.estimates["dot"],
        *found.estimates["cos"],
        noise,
        _notes(found, config, learning_rate),
    ).ordered("rate")


def _notes(found: Profile, config: Config, learning_rate: float | None) -> list[str]:
    unit = "per unit of learning rate" if learning_rate is None else f"at lr {learning_rate:g}"
    notes = [
        f"Rates are nats per step of plain full-batch gradient descent, {unit}. An optimizer like "
        "AdamW moves the weights another way; `fastpref train --track sketch` measures what it "
        "does.",
        "±: one standard error. Of rates, shares and cosines it is that of the sketches (a larger "
        f"sketch_dim than {config.sketch_dim} lessens it) and of the choice of pairs (a larger "
        "--sample); of the others that of the sketches alone.",
    ]
    if found.at_start:
        notes.append(
            "Weights of the losses, and so shares and Gamma, are those at the start of a run; name "
            "a reference (--ref_model_name_or_path) for those of a model that was trained."
        )
    if found.displaced is not None:
        notes.append(
            "d > nc^2: a step on that pair alone lowers its chosen log-prob. The rate of logp "
            "chosen is what a step on the whole data does to its mean."
        )
    if found.groups == ("head",) and config.trainable != "head":
        notes.append(
            "The head's part alone: what the body's weights add, and the input side of a tied "
            "embedding, is not in these numbers."
        )
    return notes


def write_records(folder: Path, found: Profile, dataset: Dataset, config: Config) -> None:
    """Tables `pairs`, `behaviors`, `gram` and `index`, of step 0, with the records' schema."""
    from fastpref.dynamics.recorder import Recorder
    from fastpref.dynamics.schema import TRAIN_SAMPLE

    looked_at = set(found.pairs["pair_id"].tolist())
    index = folder / "records" / "index"
    for part in index.glob("part-*"):  # of an earlier profile
        part.unlink()
    with Recorder(folder, 0, dataset.behaviors, part_steps=1) as recorder:
        recorder.index(row for row in dataset.index if row["pair_id"] in looked_at)
        recorder.pairs(0, TRAIN_SAMPLE, 0.0, norm_method=found.method, **found.pairs)
        recorder.behaviors(0, TRAIN_SAMPLE, found.rows)
        recorder.rows("gram", 0, found.gram)
        recorder.close(0)


def write_summary(folder: Path, view: ProfileView) -> None:
    """profile.json: everything that is shown, with every digit; null is not known."""
    from fastpref.report.files import write_whole

    behaviors = [
        {"behavior": name}
        | {column: plain(values[k]) for column, values in view.columns.items()}
        | {"group_norm": plain(view.group_norm[k])}
        | {"group_norm_error": plain(view.group_norm_error[k])}
        for k, name in enumerate(view.behaviors)
    ]
    matrices = {name: plain(getattr(view, name)) for name in _MATRICES}
    summary = {
        "settings": view.settings,
        "groups": list(view.groups),
        "behaviors": behaviors,
        "gamma": matrices,
        "gradient_noise_scale": plain(view.noise[0]),
        "gradient_noise_scale_error": plain(view.noise[1]),
        "notes": view.notes,
    }
    write_whole(folder / "profile.json", (json.dumps(summary, indent=1) + "\n").encode())


_MATRICES = ("dot", "dot_error", "cos", "cos_error")


def plain(value: Any) -> Any:
    """Python's own numbers and lists, None for what is not finite."""
    if isinstance(value, np.ndarray):
        return [plain(one) for one in value]
    return float(value) if math.isfinite(value) else None
