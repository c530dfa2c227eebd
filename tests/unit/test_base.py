"""`fastpref-tiny`: how it is made, kept and found; what the finished model must be good for."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref import base, base_text
from fastpref.data.generate import DEMO, generate

SMALL = base.Recipe(
    vocab_size=700,
    hidden_size=96,
    intermediate_size=64,
    layers=1,
    heads=2,
    kv_heads=1,
    max_positions=256,
    tokenizer_documents=200,
    validation_documents=8,
    steps=3,
    tokens_per_step=256,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slow" not in request.keywords:
        monkeypatch.setenv("FASTPREF_CACHE", str(request.getfixturevalue("cache")))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_the_folder_is_an_ordinary_hugging_face_model() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = base.base_dir(log=False, recipe=SMALL)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "llama"
    assert not model.config.tie_word_embeddings
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(tokenizer) == model.config.vocab_size == SMALL.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert len({tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}) == 3
    assert not [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pkl", ".pt")]
    notes = json.loads((folder / base.NOTES_FILE).read_text())
    assert notes["parameters"] == sum(p.numel() for p in model.parameters())
    assert 0 < notes["validation_loss"] < 10


def test_tokenizer_keeps_texts_and_adds_nothing() -> None:
    tokenizer = base.build_tokenizer(SMALL)
    for answer in base_text.ANSWERS:
        assert len(tokenizer.encode(answer)) == 1
    for text in ("Ein Mädchen\n\tsagt: 漢字 🙂", *next(base_text.documents(1)), ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)
    # EOS is appended to data as text; it must come back as the one token.
    assert tokenizer.encode(" Yes" + tokenizer.eos_token)[1:] == [tokenizer.eos_token_id]


def test_an_answer_does_not_change_its_contexts_tokens() -> None:
    tokenizer = base.build_tokenizer(SMALL)
    for context, answer in itertools.islice(base_text.documents(3), 100):
        joined = tokenizer.encode(context + answer)
        assert joined == tokenizer.encode(context) + tokenizer.encode(answer)


def test_same_recipe_same_bits(tmp_path: Path) -> None:
    torch.manual_seed(123)
    base.build_base(tmp_path, SMALL, log=False)
    kept = base.base_dir(log=False, recipe=SMALL)
    first, second = weights(kept), weights(tmp_path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    tokenizer = "tokenizer.json"
    assert (kept / tokenizer).read_bytes() == (tmp_path / tokenizer).read_bytes()


def test_making_it_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.no_grad():
        base.build_base(tmp_path, SMALL, log=False)
    assert torch.equal(torch.rand(3), expected)


def test_fit_lowers_the_loss(tmp_path: Path) -> None:
    losses = []
    for steps in (1, 30):
        folder = tmp_path / str(steps)
        folder.mkdir()
        base.build_base(folder, replace(SMALL, steps=steps), log=False)
        losses.append(json.loads((folder / base.NOTES_FILE).read_text())["validation_loss"])
    assert losses[1] < losses[0] - 0.5


def test_loss_is_the_weighted_mean_over_separate_lines() -> None:
    tokenizer = base.build_tokenizer(SMALL)
    model = base._new_model(SMALL, tokenizer)
    lines = list(base._encode(tokenizer, itertools.islice(base_text.documents(0), 4)))
    total = weight = 0.0
    for context, answer in lines:
        ids = torch.tensor([[*context, *answer]])
        logp = model(ids).logits[0, :-1].detach().double().log_softmax(-1)
        scored = logp[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        shares = [0.2] * (len(context) - 1) + [1.0] * len(answer)
        total -= float(scored @ torch.tensor(shares, dtype=torch.float64))
        weight += sum(shares)
    assert float(base._loss(model, lines, 0.2)) == pytest.approx(total / weight, rel=1e-5)


def test_key_follows_recipe_and_text(monkeypatch: pytest.MonkeyPatch) -> None:
    key = base.digest(SMALL)
    assert key == base.digest(replace(SMALL))
    assert key != base.digest(replace(SMALL, steps=4))
    monkeypatch.setattr(base, "VERSION", base.VERSION + 1)
    assert key != base.digest(SMALL)


def test_cache_is_read_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base.base_dir(log=False, recipe=SMALL)

    def refuse(*args: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(base, "build_base", refuse)
    assert base.base_dir(log=False, recipe=SMALL) == folder


def test_interrupted_fit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(folder: Path, *args: Any) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path))
    monkeypatch.setattr(base, "build_base", interrupt)
    with pytest.raises(KeyboardInterrupt):
        base.base_dir(log=False, recipe=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_finished_first_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(folder: Path, *args: Any) -> None:
        (folder / "config.json").write_text("late")
        other = tmp_path / f"base-{base.digest(SMALL)}"
        other.mkdir()
        (other / "config.json").write_text("early")

    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path))
    monkeypatch.setattr(base, "build_base", overtaken)
    folder = base.base_dir(log=False, recipe=SMALL)
    assert (folder / "config.json").read_text() == "early"
    assert list(tmp_path.iterdir()) == [folder]


def _make(cache: str, queue: Any) -> None:
    os.environ["FASTPREF_CACHE"] = cache
    torch.set_num_threads(1)
    queue.put(str(base.base_dir(log=False, recipe=SMALL)))


def test_two_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    makers = [context.Process(target=_make, args=(str(tmp_path), queue)) for _ in range(2)]
    for maker in makers:
        maker.start()
    found = {queue.get(timeout=120) for _ in makers}
    for maker in makers:
        maker.join()
    assert len(found) == 1
    folder = Path(found.pop())
    assert [p for p in tmp_path.iterdir()] == [folder]
    assert weights(folder)


def test_cache_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set FASTPREF_CACHE to a folder that can be written"):
        base.base_dir(log=False, recipe=SMALL)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTPREF_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert base.cache_root() == tmp_path / "own"
    monkeypatch.delenv("FASTPREF_CACHE")
    assert base.cache_root() == tmp_path / "xdg" / "fastpref"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert base.cache_root() == Path.home() / ".cache" / "fastpref"


def test_only_its_name_names_it() -> None:
    assert base.is_base_name("fastpref-tiny")
    assert not base.is_base_name("fastpref-tiny2")
    assert not base.is_base_name("gpt2")


def test_documents_are_balanced_and_repeat() -> None:
    first = list(itertools.islice(base_text.documents(0), 3000))
    assert first == list(itertools.islice(base_text.documents(0), 3000))
    assert first[:50] != list(itertools.islice(base_text.documents(1), 50))
    answers = Counter(answer for _, answer in first if answer in base_text.ANSWERS)
    assert abs(answers[" Yes"] - answers[" No"]) <= 1
    assert answers.total() > 900
    assert all(answer.startswith(" ") and context for context, answer in first)


def test_broad_vocabulary_is_broad() -> None:
    themes = base_text.themes()
    assert len({word for words in themes.values() for word in words}) > 2000
    assert {"faith", "politics", "machines", "science", "arts", "mind"} <= set(themes)


@pytest.mark.slow
def test_the_real_one_is_ready_for_preference_training() -> None:
    """Framed statements are answered by a coin; the last state holds what was said, by the dial."""
    from transformers import AutoModelForCausalLM

    tokenizer = base.load_base_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(base.base_dir()).eval()
    answers = [tokenizer.encode(answer) for answer in base_text.ANSWERS]
    assert [len(ids) for ids in answers] == [1, 1]
    delta = []
    for behavior in DEMO[:4]:
        rows = generate([behavior], 200, 0)
        states, probabilities = [], []
        for row in rows:
            with torch.no_grad():
                ids = torch.tensor([tokenizer.encode(row["question"])])
                state = model.model(ids).last_hidden_state[0, -1]
                states.append(state)
                probabilities.append(
                    model.lm_head(state).softmax(-1)[[answers[0][0], answers[1][0]]]
                )
        yes = torch.tensor([row["answer_matching_behavior"] == " Yes" for row in rows])
        state, probability = torch.stack(states), torch.stack(probabilities)
        delta.append(float((state[yes].mean(0) - state[~yes].mean(0)).norm()))
        assert probability.sum(1).mean() > 0.9
        assert abs(float(probability[:, 0].mean()) - 0.5) < 0.1
    # The dials of the demo fall from behavior to behavior, and so must the distinguishability.
    assert all(high > 1.2 * low for high, low in zip(delta, delta[1:], strict=False)), delta


@pytest.mark.slow
def test_the_real_tokenizer_on_real_statements(persona_dir: Path) -> None:
    tokenizer = base.load_base_tokenizer()
    lengths = [
        len(tokenizer.encode(json.loads(line)["question"]))
        for file in sorted(persona_dir.glob("*.jsonl"))
        for line in file.read_text("utf-8").splitlines()[:50]
    ]
    assert sum(lengths) / len(lengths) < 45
