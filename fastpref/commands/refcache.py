"""Compute reference log-probs ahead of training, for a run with the same data and model.

    fastpref refcache examples/persona.yaml --dataset_name my-pairs/

Takes what `fastpref train` takes; settings that do not decide the log-probs are passed over.
"""

from __future__ import annotations

import argparse

from fastpref.commands import add_config_options, config_from_options, show_log
from fastpref.config import unplanned

add_arguments = add_config_options


def run(args: argparse.Namespace) -> int:
    """Fill the cache that a training run with the same data and model reads; say where it is.

    With `trainable: head` also that of the body's states, from which the log-probs then come.
    """
    config = unplanned(config_from_options(args))
    show_log()
    from fastpref.data.dataset import load_dataset
    from fastpref.data.pack import demand_vocabulary
    from fastpref.features import with_states
    from fastpref.loading import load_model, load_tokenizer
    from fastpref.losses import get_loss
    from fastpref.refmodel import find_reference
    from fastpref.selfcheck import check_model

    if not get_loss(config.loss_type).needs_reference:
        print(f"loss_type {', '.join(config.loss_type)} has no reference; nothing to compute.")
        return 0
    tokenizer = load_tokenizer(config)
    dataset = load_dataset(config, tokenizer, progress=True)
    pairs = dataset.train + dataset.held_out
    model = None
    if not config.ref_model_name_or_path or config.trainable == "head":
        model = load_model(config, tokenizer)
        demand_vocabulary(pairs, len(model.head.weight))
        check_model(model, pairs, config.max_tokens_per_microbatch)
    if model and config.trainable == "head":
        dataset = with_states(config, model, dataset, progress=True)
    found, _ = find_reference(config, model, tokenizer, pairs, pack=dataset.pack)
    print(found)
    return 0
