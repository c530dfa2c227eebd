"""Rows of one completion each, marked desirable or not (KTO's format) -> rows of pairs."""

from __future__ import annotations

from collections.abc import Sequence

from fastpref.data.badrows import BadRow, Unusable, Words
from fastpref.data.messages import canonical, canonical_json
from fastpref.data.shapes import Row, present, refuse_media, side

# Text of CSV cells. Beside nulls pandas writes whole numbers and booleans as 1.0 and 0.0.
TRUTH = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}
Rows = list[tuple[int, Row]]  # line, row


def pair_rows(
    rows: Sequence[tuple[int, Row]], source: str, shared: Sequence[str]
) -> tuple[Rows, dict[int, int], list[BadRow]]:
    """Pair the n-th desirable with the n-th undesirable row of each prompt, in the file's order.

    Each row is used once, so that no completion counts double. Rows of one pair agree in the
    prompt and in the columns ``shared``. A pair stands on the line of its desirable row and has
    that row's other columns.

    Returns the pairs as rows with prompt, chosen and rejected; the line of the undesirable row of
    each; and the rows that are bad or left over.
    """
    groups: dict[str, tuple[Rows, Rows]] = {}  # desirable, undesirable
    bad: list[BadRow] = []
    for line, row in rows:
        try:
            desirable, key = _parsed(row, shared)
            groups.setdefault(key, ([], []))[not desirable].append((line, row))
        except Unusable as why:
            bad.append(why.at(source, line))
    pairs: Rows = []
    partner: dict[int, int] = {}
    for good, poor in groups.values():
        for (line, chosen), (other, rejected) in zip(good, poor, strict=False):
            pairs.append((line, _joined(chosen, rejected)))
            partner[line] = other
        used = min(len(good), len(poor))
        left = Unusable(
            "no row of the other label is left to pair it with",
            Words(f"of this prompt {len(good)} rows with label true, {len(poor)} with false"),
        )
        bad += [left.at(source, line) for line, _ in good[used:] + poor[used:]]
    return sorted(pairs, key=lambda pair: pair[0]), partner, bad


def _parsed(row: Row, shared: Sequence[str]) -> tuple[bool, str]:
    """Whether the row is desirable, and what it must have in common with its partner."""
    refuse_media(row)
    label = present(row, "label")
    if isinstance(label, str):
        label = TRUTH.get(label.strip().lower(), label)
    if label not in (0, 1):  # True and 1.0 are equal to 1
        raise Unusable("column 'label' is neither true nor false", label)
    completion = side(row, "completion")
    if isinstance(completion, str) and not completion.strip():
        raise Unusable("the completion is empty", completion)
    common = [canonical(side(row, "prompt")), *(row.get(name) for name in shared)]
    return bool(label), canonical_json(common, "the row")


def _joined(chosen: Row, rejected: Row) -> Row:
    rest = {name: value for name, value in chosen.items() if name not in ("completion", "label")}
    return {
        **rest,
        "chosen": chosen["completion"],
        "rejected": rejected["completion"],
        "ref_chosen_logps": chosen.get("ref_logps"),
        "ref_rejected_logps": rejected.get("ref_logps"),
    }
