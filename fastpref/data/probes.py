"""The probe table: fixed responses whose log-probs are followed, after Ren & Sutherland.

"Learning dynamics of LLM finetuning" (ICLR 2025) tells what training does to a model by scoring
responses of several types to the same prompts: the chosen and the rejected one, what the model
said before training, answers to other prompts, shuffled words. Probes come from a file, from the
run's own pairs, or both; tokens follow the rules of training (EOS, prompt, `max_length`).
"""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastpref.config import Config
from fastpref.data.badrows import SHOWN_BAD_ROWS, BadRow, Unusable, Words, listed, nearest
from fastpref.data.branches import Probe
from fastpref.data.coder import Coder, Ids, Rows
from fastpref.data.dataset import Dataset, sample_pairs
from fastpref.data.files import Source, find_sources
from fastpref.data.formats import Pair, digest63, template_kwargs_of, tools_of
from fastpref.data.messages import canonical, canonical_json
from fastpref.data.readers import read_source
from fastpref.data.shapes import (
    Row,
    check_conversation,
    conversation,
    refuse_media,
    side,
    text,
)
from fastpref.data.tokenize import TokenPair, make_ids
from fastpref.probe_types import (
    CHOSEN,
    INITIAL,
    IRR_TEST,
    IRR_TRAIN,
    PROBE_TYPES,
    RANDOM_PERMUTE,
    RANDOM_TOKENS,
    REJECTED,
)

COLUMNS = ("prompt", "response", "response_type")
ALSO = ("behavior", "id", "tools", "chat_template_kwargs")
TYPE_NAME = re.compile(r"[a-z][a-z0-9_]*")
TRIES = 16  # shuffles and donors before a probe that would repeat the pair's own answer is left out


def build_probes(config: Config, tokenizer: Any, dataset: Dataset) -> list[Probe]:
    """The run's probes, those of the file first; a function of data and seed alone.

    Those of type ``initial``, which the model has to write, are not among them. Raises ValueError,
    naming file and line, for a file that is no probe file, a response type or behavior that is not
    known, a probe that `max_length` would cut, and where there is no probe.
    """
    probes = read_probes(config, tokenizer, dataset.behaviors) if config.probes else []
    probes += pair_probes(config, tokenizer, dataset)
    if not probes and not (INITIAL in config.probe_types and config.probe_prompts):
        raise ValueError(
            "probe_every is set, but there is no probe: probe_prompts or probe_types is empty, or "
            "no response of these types exists. Set probe_prompts and probe_types, or probes."
        )
    places: dict[int, Probe] = {}
    for probe in probes:
        other = places.setdefault(probe.probe_id, probe)
        if other is not probe:
            raise ValueError(
                f"{probe.source}:{probe.line}: the probe has the probe_id of "
                f"{other.source or 'a probe of the run'}:{other.line}. Give one another id."
            )
    return probes


# --------------------------------------------------------------------- from the run's own pairs


def pair_probes(config: Config, tokenizer: Any, dataset: Dataset) -> list[Probe]:
    """Responses of `probe_types` to the prompts of `probe_pairs`, prompt by prompt.

    A shuffled or borrowed answer that comes out as one of the pair's own is left out, as it is for
    all one-token answers alike.
    """
    types = [kind for kind in PROBE_TYPES if kind in config.probe_types]
    if IRR_TEST in types and not dataset.held_out:
        raise ValueError(
            f"probe_types holds {IRR_TEST}, answers to held-out prompts, but no pair is held out. "
            "Set eval_fraction or eval_dataset_name, or leave it out."
        )
    donors = {IRR_TRAIN: dataset.train, IRR_TEST: dataset.held_out}
    probes = []
    for pair in probe_pairs(dataset.train, config.probe_prompts, config.seed):
        for kind in types:
            rng = np.random.default_rng(digest63("probe", kind, config.seed, pair.pair_id))
            if kind in (CHOSEN, REJECTED):
                response: np.ndarray | None = pair.chosen if kind == CHOSEN else pair.rejected
            elif kind == INITIAL:
                continue
            elif kind == RANDOM_PERMUTE:
                response = _permuted(pair, tokenizer, rng)
            elif kind == RANDOM_TOKENS:
                response = _random(pair, tokenizer, rng)
            else:
                room = config.max_length - len(pair.prompt)
                response = _borrowed(pair, donors[kind], room, rng)
            if response is not None:
                probes.append(probe_of(pair, kind, response))
    return probes


def probe_of(pair: TokenPair, kind: str, response: np.ndarray) -> Probe:
    """The probe of type ``kind`` that is made from ``pair``."""
    probe_id = digest63("probe", pair.pair_id, kind)
    return Probe(probe_id, pair.pair_id, pair.behavior, kind, pair.prompt, response)


def probe_pairs(pairs: Sequence[TokenPair], count: int, seed: int) -> list[TokenPair]:
    """``count`` of ``pairs``, in turn from every behavior as long as it has some: those whose
    prompts are probed."""
    of_behavior: dict[int, list[TokenPair]] = {}
    for pair in sample_pairs(pairs, count, seed) if count else []:
        of_behavior.setdefault(pair.behavior, []).append(pair)
    turns = max(map(len, of_behavior.values()), default=0)
    in_turn = [own[i] for i in range(turns) for own in of_behavior.values() if i < len(own)]
    return in_turn[:count]


def _own(pair: TokenPair, response: np.ndarray) -> bool:
    return any(np.array_equal(response, own) for own in (pair.chosen, pair.rejected))


def _without_eos(pair: TokenPair, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The chosen completion and the EOS behind it, empty where it has none."""
    ends = len(pair.chosen) > 1 and pair.chosen[-1] == getattr(tokenizer, "eos_token_id", None)
    cut = len(pair.chosen) - bool(ends)
    return pair.chosen[:cut], pair.chosen[cut:]


def _permuted(pair: TokenPair, tokenizer: Any, rng: np.random.Generator) -> np.ndarray | None:
    words, end = _without_eos(pair, tokenizer)
    for _ in range(TRIES):
        response = np.concatenate([rng.permutation(words), end])
        if not _own(pair, response):
            return response
    return None


def _random(pair: TokenPair, tokenizer: Any, rng: np.random.Generator) -> np.ndarray | None:
    words, end = _without_eos(pair, tokenizer)
    special = set(tokenizer.all_special_ids)
    plain = np.array([i for i in range(len(tokenizer)) if i not in special], np.int32)
    response = np.concatenate([rng.choice(plain, len(words)), end])
    return None if _own(pair, response) else response


def _borrowed(
    pair: TokenPair, others: Sequence[TokenPair], room: int, rng: np.random.Generator
) -> np.ndarray | None:
    """Another prompt's chosen completion, cut like one that is trained on."""
    for _ in range(TRIES):
        other = others[int(rng.integers(len(others)))]
        response = other.chosen[:room]
        if not (np.array_equal(other.prompt, pair.prompt) or _own(pair, response)):
            return response
    return None


# --------------------------------------------------------------------------------- from a file


def read_probes(config: Config, tokenizer: Any, behaviors: Sequence[str]) -> list[Probe]:
    """The probes of the file `probes`: rows of prompt, response, response_type, and, where they
    are, behavior and id; text or conversations, as pairs are."""
    assert config.probes
    pairs: list[Pair] = []  # of a response twice, so that it is read and tokenised as pairs are
    types: list[str] = []
    bad: list[BadRow] = []
    try:
        sources = find_sources([config.probes])
    except ValueError as error:
        raise ValueError(f"probes: {error}") from None
    for source in sources:
        table = read_source(source, frozenset((*COLUMNS, *ALSO)))
        bad += table.bad
        if table.names or not table.bad:  # else no line could be read, which is what is to be said
            _demand_columns(source, list(table.names))
        for line, row in table.rows:
            try:
                pair, kind = _row(source, line, row, behaviors)
            except Unusable as why:
                bad.append(why.at(source.name, line))
                continue
            pairs.append(pair)
            types.append(kind)
    _refuse(bad)
    seen: dict[int, Pair] = {}
    for pair in pairs:
        other = seen.setdefault(pair.pair_id, pair)
        if other is not pair:
            what = f"id {pair.id!r}" if pair.id else "prompt, response, type and behavior"
            bad.append(
                BadRow(pair.source, pair.line, f"{what} stand twice", f"line {other.line} too")
            )
    _refuse(bad)
    ids = _tokenised(config, tokenizer, pairs)
    number = {name: k for k, name in enumerate(behaviors)}
    probes = []
    for n, (pair, kind) in enumerate(zip(pairs, types, strict=True)):
        prompt, response, _ = ids.row(n)
        try:
            if n in ids.faults:
                raise Unusable(ids.faults[n][0], Words(ids.faults[n][1]))
            if len(prompt) + len(response) > config.max_length:
                value = f"{len(prompt)} prompt and {len(response)} response tokens"
                raise Unusable(
                    f"the probe is longer than max_length, {config.max_length}; shorten it, or "
                    "raise max_length",
                    Words(value),
                )
            if len(response) <= (len(prompt) == 0):
                value = f"{len(response)} tokens after {len(prompt)} prompt tokens"
                raise Unusable("the response has no token to score", Words(value))
        except Unusable as why:
            bad.append(why.at(pair.source, pair.line))
            continue
        prompt_id = digest63("prompt", canonical(pair.prompt))
        probes.append(
            Probe(
                pair.pair_id,
                prompt_id,
                number.get(pair.behavior, -1),
                kind,
                prompt,
                response,
                pair.id,
                pair.source,
                pair.line,
            )
        )
    _refuse(bad)
    return probes


def _demand_columns(source: Source, names: Sequence[str]) -> None:
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        hint = ""
        if "chosen" in names or "rejected" in names:
            hint = " To probe a run's own pairs, set probe_types and probe_prompts instead."
        raise ValueError(
            f"probes {source.name}: expected the columns {', '.join(COLUMNS)} (and behavior, id "
            f"where they are known), but {', '.join(missing)} {'are' if missing[1:] else 'is'} "
            f"missing; there are "
            f"{listed(names)}.{hint}"
        )


def _row(source: Source, line: int, row: Row, behaviors: Sequence[str]) -> tuple[Pair, str]:
    refuse_media(row)
    prompt, response = side(row, "prompt"), side(row, "response")
    if not (isinstance(prompt, str) and isinstance(response, str)):
        prompt, response, _ = conversation(prompt, response, response)
    check_conversation(prompt, response, response, None)
    if isinstance(response, str) and not response.strip():
        raise Unusable("the response is empty", response)
    kind = text(row, "response_type")
    _check_type(kind)
    behavior = row.get("behavior")
    if behavior is not None:
        behavior = text(row, "behavior")
        if behavior not in behaviors:
            raise Unusable(
                f"the run has no such behavior, but {listed(behaviors)}"
                + nearest(behavior, behaviors),
                behavior,
            )
    given = row.get("id")
    user_id = "" if given is None else str(given) if isinstance(given, int) else text(row, "id")
    tools, kwargs = None, None
    if not isinstance(prompt, str):
        tools, kwargs = tools_of(row), template_kwargs_of(row)
    asked = canonical_json([tools, kwargs], "a tool or template option")
    content = (kind, behavior or "", canonical(prompt), canonical(response), asked)
    probe_id = digest63("probe", user_id) if user_id else digest63("probe", *content)
    pair = Pair(
        prompt=prompt,
        chosen=response,
        rejected=response,
        id=user_id,
        behavior=behavior or "",
        label="",
        flipped=False,
        source=source.name,
        line=line,
        pair_id=probe_id,
        tools=tools,
        template_kwargs=kwargs,
    )
    return pair, kind


def _check_type(kind: str) -> None:
    """Types of a file are free, but one that is nearly a known one is a slip that would hide it."""
    if not TYPE_NAME.fullmatch(kind):
        raise Unusable("a response_type is lower-case letters, digits and _", kind)
    near = difflib.get_close_matches(kind, PROBE_TYPES, n=1, cutoff=0.85)
    if kind not in PROBE_TYPES and near:
        raise Unusable(f"unknown response_type. Did you mean {near[0]!r}?", kind)


def _tokenised(config: Config, tokenizer: Any, pairs: Sequence[Pair]) -> Ids:
    kinds = {isinstance(pair.prompt, str) for pair in pairs}
    date = config.template_date
    coder = Coder(
        tokenizer,
        config.append_eos,
        datetime.date.fromisoformat(date) if date else datetime.date.today(),
        strings=True in kinds,
        conversations=False in kinds,
    )
    return make_ids(coder, Rows(pairs), config.dataset_num_proc, progress=False)


def _refuse(bad: Sequence[BadRow]) -> None:
    if bad:
        shown = "\n".join(f"  {row}" for row in bad[:SHOWN_BAD_ROWS])
        raise ValueError(
            f"probes: {len(bad)} rows cannot be used, the first {min(len(bad), SHOWN_BAD_ROWS)}:\n"
            f"{shown}\nCorrect or remove them."
        )
