"""Compute reference log-probs ahead of training, for a run with the same data and model.

    fastpref refcache examples/persona.yaml --dataset_name my-pairs/

Takes what `fastpref train` takes; settings that do not decide the log-probs are passed over.
"""

from __future__ import annotations

import argparse

from fastpref.commands import add_config_options, config_from_options, show_log

add_arguments = add_config_options


def run(args: argparse.Namespace) -> int:
    """Fill the caches that a training run with the same data and model reads: reference log-probs,
    and with `trainable: head` the body's states, from which the log-probs then come."""
    config = config_from_options(args)
    show_log()
    from fastpref.data.dataset import load_dataset
    from fastpref.features import with_states
    from fastpref.losses import get_loss
    from fastpref.model import load_model
    from fastpref.refcache import with_reference

    if not get_loss(config.loss_type).needs_reference:
        print(f"loss_type {', '.join(config.loss_type)} has no reference; nothing to compute.")
        return 0
    model = load_model(config)
    dataset = load_dataset(config, model.tokenizer)
    if config.trainable == "head":
        dataset = with_states(config, model, dataset, progress=True)
    pairs = with_reference(
        model,
        dataset.train + dataset.held_out,
        cache_dir=config.ref_cache_dir,
        check_pairs=config.ref_check_pairs,
        seed=config.seed,
        ld_alpha=config.ld_alpha,
        pack=dataset.pack,
    )
    print(f"{len(pairs)} pairs have their reference log-probs.")
    return 0
