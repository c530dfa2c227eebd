"""Estimate the memory of a training run before anything is loaded, and what to set.

    fastpref plan examples/persona.yaml --model_name_or_path path/to/Llama-3-8B --memory 80GB
    fastpref plan --model_name_or_path path/to/model --prompt_tokens 512 --completion_tokens 256

Of the model its config.json alone is read, no weights and no data. --memory means a GPU of that
size, which need not be here; without it, the device of this machine. gradient_checkpointing: auto
and max_tokens_per_microbatch: 0 are chosen. fastpref train makes the same plan, with the lengths of
its data. Exit code 2 where the run does not fit.
"""

from __future__ import annotations

import argparse

from fastpref.commands import add_config_options, config_from_options, show_log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fastpref plan`: those of training, and the device and the pairs to plan for."""
    own = parser.add_argument_group("plan")
    own.add_argument("--memory", metavar="SIZE", help="of a GPU, as 80GB or 24GiB [this device's]")
    own.add_argument(
        "--prompt_tokens", type=int, metavar="N", help="of every pair [half of max_length]"
    )
    own.add_argument(
        "--completion_tokens", type=int, metavar="N", help="of each completion [the other half]"
    )
    add_config_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table; ValueError where the run does not fit."""
    config = config_from_options(args)
    prompt = config.max_length // 2 if args.prompt_tokens is None else args.prompt_tokens
    completion = args.completion_tokens
    if completion is None:
        completion = max(config.max_length - prompt, 2)
    for name, value, least in (("prompt", prompt, 1), ("completion", completion, 1)):
        if value < least:
            raise ValueError(f"--{name}_tokens: expected {least} or more, got {value}")
    show_log()
    from fastpref.data.pack import demand_budget, fed_tokens, scored_rows
    from fastpref.loading import resolve_device, routes
    from fastpref.memory import Memory, read_size
    from fastpref.planner import Unknown, made_pairs, make_plan, refusal

    memory = (
        Memory.of(resolve_device(config.device))
        if args.memory is None
        else Memory.of_gpu(read_size(args.memory))
    )
    pairs = made_pairs(prompt, completion, config.train_batch_size)
    head = config.trainable == "head"
    sizes = scored_rows(pairs) if head else fed_tokens(pairs, whole=routes(config))
    if config.max_tokens_per_microbatch:
        demand_budget(sizes, config.max_tokens_per_microbatch)
    try:
        plan = make_plan(config, pairs, sizes, memory)
    except Unknown as error:
        raise ValueError(
            f"model_name_or_path={config.model_name_or_path!r}: a step cannot be rehearsed without "
            f"weights: {error}"
        ) from error
    print(plan.table())
    if plan.refused:
        raise ValueError(refusal(plan, pairs, sizes))
    return 0
