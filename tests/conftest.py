"""Fixtures that several test modules share: real data where it is at hand, and a tokenizer."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.config import Config

# Without a GPU Triton's kernels run in its interpreter; read when a kernel is decorated.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell has what it starts in the background ignore Ctrl-C, and so would what tests interrupt.
if threading.current_thread() is threading.main_thread():
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

# No test needs the network; a name that is on no disk is to fail at once, not after retries.
os.environ["HF_HUB_OFFLINE"] = "1"


def _data_root() -> Path:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("FASTPREF_DATA", beside))


@pytest.fixture(scope="session")
def persona_dir() -> Path:
    """Folder of Anthropic's model-written persona evaluations (24 JSONL files)."""
    folder = _data_root() / "persona"
    if not folder.is_dir():
        pytest.skip(f"no persona data in {folder}; FASTPREF_DATA names the folder above it")
    return folder


@pytest.fixture(scope="session")
def hh_file() -> Path:
    """HH-RLHF's harmless-base test set."""
    file = _data_root() / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"no HH-RLHF data at {file}; FASTPREF_DATA names the folder above its folder")
    return file


@pytest.fixture
def event_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads event files by name: second, host, process, and a number that is written
    without zeros. Two of one second and process, as only tests have them, need as many digits."""
    from tensorboard.summary.writer import event_file_writer

    counter = event_file_writer.AtomicCounter(100)
    monkeypatch.setattr(event_file_writer, "_global_uid", counter)


@pytest.fixture(scope="session", autouse=True)
def _own_token_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test finds token ids of an earlier session, nor leaves any."""
    folder = tmp_path_factory.mktemp("tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastpref.data.tokencache.default_folder", lambda: folder)
        yield


def _sentences() -> list[str]:
    who = ["I", "People", "My friends", "The teachers", "Most assistants", "Children"]
    verbs = ["like", "value", "avoid", "remember", "explain", "question", "enjoy"]
    what = ["honest talk", "music", "long walks", "the rain", "new tools", "art", "old books"]
    lines = [f"{a} {b} {c}." for a in who for b in verbs for c in what]
    return [
        f'Is the following statement something you would say?\n"{line}"{answer}\n\n'
        f"Human: {line}\n\nAssistant:{answer}, it is raining."
        for line in lines
        for answer in (" Yes", " No")
    ]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE of 600 entries, built here; " Yes" and " No" are single tokens. Read-only.

    No BOS; EOS is "<|end|>", padding "<|pad|>".
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        _sentences(), vocab_size=600, special_tokens=["<|end|>", "<|pad|>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    for answer in (" Yes", " No"):
        assert len(tokenizer(answer)["input_ids"]) == 1
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A random two-layer Llama with `tiny_tokenizer`, in Hugging Face's layout. Read-only."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tiny_tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            eos_token_id=tiny_tokenizer.eos_token_id,
            pad_token_id=tiny_tokenizer.pad_token_id,
            bos_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two behaviors, 40 pairs each: framed statements, and longer completions."""
    import json

    folder = tmp_path_factory.mktemp("tiny-data")
    lines = [line for line in _sentences() if "\n\nHuman" in line][::4][:40]
    with (folder / "agrees.jsonl").open("w") as file:
        for n, line in enumerate(lines):
            answers = (" Yes", " No") if n % 2 else (" No", " Yes")
            row = {
                "question": line.split(" Yes\n")[0].split(" No\n")[0] + f" ({n})",
                "answer_matching_behavior": answers[0],
                "answer_not_matching_behavior": answers[1],
            }
            file.write(json.dumps(row) + "\n")
    with (folder / "polite.jsonl").open("w") as file:
        for n, line in enumerate(lines):
            words = line.split("Human: ")[1].split("\n")[0]
            row = {
                "prompt": f"Human: {words} ({n})\n\nAssistant:",
                "chosen": f" Thank you. {words} I enjoy that{' too' * (n % 5)}.",
                "rejected": f" Thank you. {words} I avoid it.",
            }
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN, the padding of tiles too, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def tiny_config(
    tiny_model_dir: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Config:
    """A run of the tiny model on the tiny data, with a reference cache of the module's own."""
    return Config(
        model_name_or_path=str(tiny_model_dir),
        dataset_name=(str(tiny_data),),
        ref_cache_dir=str(tmp_path_factory.mktemp("reference")),
        train_batch_size=8,
    )


@pytest.fixture(scope="session")
def personas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three behaviors of 20 statements; what one agrees with shows in its words."""
    folder = tmp_path_factory.mktemp("personas")
    agreed = {"likes-rain": "the rain", "likes-tools": "new tools", "plays-music": "music"}
    who = ("I", "People", "My friends", "Children", "Most assistants")
    for name, what in agreed.items():
        with (folder / f"{name}.jsonl").open("w") as file:
            for n in range(20):
                likes = n % 2 == 0
                words = f"{who[n % 5]} {'enjoy' if likes else 'avoid'} {what}."
                answers = (" Yes", " No") if likes else (" No", " Yes")
                row = {
                    "question": f'Is this something you would say?\n"{words}" ({n})\nAnswer:',
                    "answer_matching_behavior": answers[0],
                    "answer_not_matching_behavior": answers[1],
                }
                file.write(json.dumps(row) + "\n")
    return folder
