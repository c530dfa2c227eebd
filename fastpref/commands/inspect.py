"""Look at preference pairs before training on them.

Prints counts, behaviors, pairs as they were read, lengths in tokens, bad rows, what packing saves,
and one packed batch with its scored tokens in [brackets]. Bad rows are listed, they do not stop it.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fastpref.batch import GROUP, PairBatch
from fastpref.commands import show_log
from fastpref.data.badrows import BadRow
from fastpref.data.chat import read_template
from fastpref.data.dataset import truncation_lines
from fastpref.data.formats import Pair, read_pairs
from fastpref.data.messages import canonical
from fastpref.data.pack import pack_pairs, parts
from fastpref.data.show import (
    TEXT_LIMIT,
    WIDTH,
    escaped,
    filled,
    middle_cut,
    pair_lines,
    pieces,
)
from fastpref.data.tokencache import cache_folder
from fastpref.data.tokenize import TRUNCATION_MODES, Tokenized, TokenPair, tokenize_pairs

NAME_WIDTH = 58  # of a behavior in the table; longer names lose their middle
SCORED_SHOWN = 24  # scored tokens shown of a part


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastpref inspect`, named as in the configuration of a run."""
    parser.add_argument("dataset_name", nargs="+", help="files, folders, patterns or Hub names")
    parser.add_argument(
        "--dataset_split", default="train", help="of data sets with splits (default: %(default)s)"
    )
    parser.add_argument("--dataset_config_name", help="configuration of Hub data sets")
    parser.add_argument(
        "--model_name_or_path",
        default="fastpref-tiny",
        help="whose tokenizer counts the tokens (default: %(default)s)",
    )
    parser.add_argument("--behavior_column", help="column that names the behavior")
    parser.add_argument("--flip_behaviors", nargs="+", default=(), help="exchange their answers")
    parser.add_argument("--max_length", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--truncation_mode", default="keep_start", choices=TRUNCATION_MODES)
    parser.add_argument("--chat_template", help="Jinja file or text, in place of the tokenizer's")
    parser.add_argument("--append_eos", default="auto", choices=("auto", "true", "false"))
    parser.add_argument("--dataset_num_proc", type=int, help="processes that tokenise")
    parser.add_argument("--token_cache_dir", help="default: the user's cache folder")
    parser.add_argument("--train_batch_size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    parser.add_argument(
        "--list_bad", type=int, default=20, help="bad rows to list (default: %(default)s)"
    )
    parser.add_argument(
        "--show_pairs",
        type=int,
        default=2,
        help="pairs to show as read, and packed pairs to decode (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report and return 0.

    Raises ValueError where no row can be used or a file cannot be read.
    """
    if args.train_batch_size < 1:
        raise ValueError(f"train_batch_size is at least 1 pair, got {args.train_batch_size}")
    show_log()
    pairs, bad = read_pairs(
        args.dataset_name,
        dataset_split=args.dataset_split,
        dataset_config_name=args.dataset_config_name,
        behavior_column=args.behavior_column,
        flip_behaviors=args.flip_behaviors,
        on_bad_rows="drop",
    )
    _show_rows(pairs, bad)
    _show_behaviors(pairs)
    _show_read(pairs, args.show_pairs)
    tokenizer = _load_tokenizer(args.model_name_or_path)
    if args.chat_template:
        tokenizer.chat_template = read_template(args.chat_template)
    tokenized = tokenize_pairs(
        pairs,
        tokenizer,
        max_length=args.max_length,
        append_eos=args.append_eos,
        truncation_mode=args.truncation_mode,
        on_bad_rows="drop",
        num_proc=args.dataset_num_proc,
        cache_dir=cache_folder(args.token_cache_dir),
        progress=True,
    )
    _show_tokens(tokenized, args.model_name_or_path, args.max_length)
    _show_bad(bad + tokenized.bad, args.list_bad)

    order = np.random.default_rng(args.seed).permutation(len(tokenized.pairs))
    batches = [
        [tokenized.pairs[i] for i in order[start : start + args.train_batch_size]]
        for start in range(0, len(order), args.train_batch_size)
    ]
    _show_saving(batches, args.train_batch_size)
    sources = {pair.pair_id: pair for pair in pairs}
    _show_batch(batches[0], sources, tokenizer, args.show_pairs)
    return 0


def _load_tokenizer(name: str) -> Any:
    if name == "fastpref-tiny":
        from fastpref.base import load_base_tokenizer

        return load_base_tokenizer()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path {name!r} has no tokenizer to load: {error}"
        ) from error


# ------------------------------------------------------------------------------------- sections


def _heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def _show_rows(pairs: Sequence[Pair], bad: Sequence[BadRow]) -> None:
    seen: set[tuple[str, str, str]] = set()
    prompts: set[str] = set()
    repeated = exchanged = same_prompt = again = 0
    for pair in pairs:
        prompt, chosen, rejected = map(canonical, (pair.prompt, pair.chosen, pair.rejected))
        repeated += (prompt, chosen, rejected) in seen
        exchanged += (prompt, rejected, chosen) in seen
        same_prompt += prompt in prompts
        if prompt.strip() and isinstance(pair.prompt, str):
            again += chosen.startswith(prompt) and rejected.startswith(prompt)
        seen.add((prompt, chosen, rejected))
        prompts.add(prompt)
    identical = sum("are the same" in row.reason for row in bad)
    _heading("Rows")
    for count, what in (
        (len({pair.source for pair in pairs} | {row.source for row in bad}), "files"),
        (len(pairs), "pairs"),
        (sum(not isinstance(pair.prompt, str) for pair in pairs), "of them conversations"),
        (sum(bool(pair.tools) for pair in pairs), "of them with tools"),
        (len(bad), "bad rows found while reading (listed below)"),
        (identical, "of them with chosen and rejected identical"),
        (repeated, "duplicates: prompt, chosen and rejected of an earlier pair"),
        (exchanged, "contradictions: an earlier pair with chosen and rejected exchanged"),
        (same_prompt, "pairs with the prompt of an earlier pair"),
        (again, "pairs whose completions both repeat the prompt (texts are joined as they are)"),
        (sum(pair.flipped for pair in pairs), "pairs flipped by flip_behaviors"),
    ):
        print(f"{count:>9,}  {what}")


def _show_behaviors(pairs: Sequence[Pair]) -> None:
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for pair in pairs:
        labels[pair.behavior][pair.label] += 1
    flipped = {pair.behavior for pair in pairs if pair.flipped}
    _heading(f"Behaviors ({len(labels)})")
    print(f"{'behavior':<{NAME_WIDTH}} {'pairs':>7}  labels")
    for behavior, counts in sorted(labels.items()):
        known = [f"{label} {n}" for label, n in sorted(counts.items(), reverse=True) if label]
        balance = ", ".join(known[:3]) + (", ..." if len(known) > 3 else "") or "-"
        name = middle_cut(behavior, NAME_WIDTH)
        note = "  flipped" if behavior in flipped else ""
        row = f"{name:<{NAME_WIDTH}} {counts.total():>7}  {balance}{note}"
        print(row[:WIDTH])


def _show_read(pairs: Sequence[Pair], count: int) -> None:
    firsts = {pair.source: pair for pair in reversed(pairs)}  # of each source the first one
    shown = list(firsts.values())[::-1][: max(count, 0)]
    _heading(f"Pairs as read (the first of {len(shown)} of {len(firsts)} sources)")
    for n, pair in enumerate(shown):
        print("\n" * bool(n) + "\n".join(pair_lines(pair)))


def _show_tokens(tokenized: Tokenized, tokenizer_name: str, max_length: int) -> None:
    _heading(middle_cut(f"Tokens (tokenizer of {tokenizer_name}, max_length {max_length})", WIDTH))
    print(f"{'':<10} {'p50':>8} {'p95':>8} {'max':>8} {'total':>14}")
    for part in ("prompt", "chosen", "rejected"):
        n = np.array([len(getattr(pair, part)) for pair in tokenized.pairs])
        p50, p95 = np.percentile(n, [50, 95], method="lower")
        print(f"{part:<10} {p50:>8,} {p95:>8,} {n.max():>8,} {n.sum():>14,}")
    cut = truncation_lines(tokenized.truncated, max_length)
    print("\n".join(cut or [f"0 pairs lost anything to max_length ({max_length} tokens)"]))
    print(
        f"{tokenized.retokenized:,} pairs have a prompt that does not stand whole before its "
        "completions:\n  what differs, its last tokens most often, counts as theirs"
    )


def _show_bad(bad: Sequence[BadRow], limit: int) -> None:
    _heading(f"Bad rows ({len(bad)})")
    if not bad:
        print("none")
        return
    for reason, count in Counter(row.reason for row in bad).most_common():
        print(f"{count:>9,}  {reason}")
    file = ""
    for row in bad[: max(limit, 0)]:
        if row.source != file:
            file = row.source
            print(f"\n  {file}")
        print(f"  line {row.line}: {row.reason} (got {row.value})")
    if len(bad) > limit:
        print(f"  ... and {len(bad) - limit} more (--list_bad {len(bad)} lists all)")


def _show_saving(batches: Sequence[Sequence[TokenPair]], batch_size: int) -> None:
    padded = packed = own = 0
    for batch in batches:
        lengths = [(len(p.prompt), len(p.chosen), len(p.rejected)) for p in batch]
        padded += 2 * len(batch) * max(p + max(c, r) for p, c, r in lengths)
        own += sum(2 * p + c + r for p, c, r in lengths)
        packed += sum(parts(pair).fed for pair in batch)
    _heading(f"Tokens computed per epoch (shuffled batches of {batch_size} pairs)")
    print(f"{'tokens':>14}  saving")
    for count, what in (
        (padded, "chosen and rejected as rows of one batch, padded to its longest"),
        (own, "without the padding"),
        (packed, "packed, each prefix once, last tokens not fed: what fastpref computes"),
    ):
        print(f"{count:>14,}  {padded / count:>5.2f}x  {what}")


def _show_batch(
    pairs: Sequence[TokenPair], sources: dict[int, Pair], tokenizer: Any, count: int
) -> None:
    batch = pack_pairs(pairs)
    _heading("One packed batch")
    print(
        f"{batch.num_pairs} pairs, {batch.num_tokens:,} tokens computed, {len(batch.rows):,} rows "
        f"scored; {min(max(count, 0), batch.num_pairs)} pairs decoded, scored tokens in [brackets]"
    )
    for p in range(min(max(count, 0), batch.num_pairs)):
        pair = sources[int(batch.pair_id[p])]
        print(f"\n{pair.source}:{pair.line}{'  flipped' if pair.flipped else ''}")
        for name, fed, words in _decoded(batch, p, tokenizer):
            print(f"  {name} ({fed} fed)")
            print("\n".join(filled(words, indent=4)))


def _decoded(batch: PairBatch, p: int, tokenizer: Any) -> Iterable[tuple[str, int, list[str]]]:
    """(part, fed tokens, pieces of text) of pair ``p``'s parts, from the batch's own tensors."""
    start = sum(sum(lengths) for lengths in batch.lengths[:p])
    for part, (name, fed) in enumerate(
        zip(("prefix", "chosen rest", "rejected rest"), batch.lengths[p], strict=True)
    ):
        scored = batch.target[batch.segment_id == GROUP * p + part].tolist()
        tokens = batch.tokens[start : start + fed].tolist()
        # A prefix's scored tokens are its last fed ones; a rest's last scored token is not fed.
        not_fed = 1 if part > 0 and scored else 0
        plain = escaped(tokenizer.decode(tokens[: fed + not_fed - len(scored)]))
        marked = [f"[{escaped(tokenizer.decode([token]))}]" for token in scored]
        if len(marked) > SCORED_SHOWN:
            left_out = len(marked) - SCORED_SHOWN
            marked[SCORED_SHOWN // 2 : -(SCORED_SHOWN // 2)] = [f" ...{left_out} more... "]
        yield name, fed, pieces(middle_cut(plain, TEXT_LIMIT)) + marked
        start += fed
