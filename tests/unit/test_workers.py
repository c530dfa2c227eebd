"""Tokenising in processes: the same ids, and no process that outlives its parent."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastpref.data import tokenize
from fastpref.data.coder import CHUNK, Coder, Ids
from fastpref.data.tokenize import make_ids
from fastpref.data.workers import Workers, coder_from, setup_of

DAY = datetime.date(2024, 2, 29)
TEMPLATE = (
    "{{ bos_token + strftime_now('%Y') }}{% for m in messages %}{{ m.role + m.content + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer,
        bos_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=TEMPLATE,
    )


def strings(count: int) -> list[str]:
    rows = [f'["I like {n} walks é"," No"," Yes",null,null]' for n in range(count)]
    rows[count // 2] = '["\\ud800"," a"," b",null,null]'
    return rows


def chats(count: int) -> list[str]:
    turn = '[{"role":"user","content":"%s"}]'
    rows = [f"[{turn % n},{turn % 'No'},{turn % 'Yes'},null,null]" for n in range(count)]
    rows[count // 2] = f"[[],{turn % 'No'},{turn % 'Yes'},null,null]"
    return rows


def same(a: Ids, b: Ids) -> bool:
    arrays = ("values", "lengths", "alone")
    return a.faults == b.faults and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays
    )


def test_ids_do_not_depend_on_the_number_of_processes(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = strings(3 * CHUNK + 5)
    coder = Coder(tokenizer, "auto", DAY)
    one = make_ids(coder, rows, 1, False)
    assert list(one.faults) == [len(rows) // 2]
    assert same(make_ids(coder, rows, 2, False), one)
    monkeypatch.setattr(tokenize, "WORTH_WORKERS", 0.01)  # after a second
    monkeypatch.setattr(tokenize.time, "perf_counter", iter(range(10**6)).__next__)
    monkeypatch.setattr(tokenize, "_cpus", lambda: 2)
    started = []
    before = Workers.__init__
    monkeypatch.setattr(
        Workers, "__init__", lambda self, coder, n: started.append(n) or before(self, coder, n)
    )
    assert same(make_ids(coder, rows, None, False), one) and started == [2]


def test_conversations_in_processes(tokenizer: Any) -> None:
    rows = [*chats(6), *strings(4)]
    coder = Coder(tokenizer, "true", DAY, conversations=True)
    one = coder.ids(rows)
    assert list(one.faults) == [3, 8]
    with Workers(coder, 1) as workers:
        assert same(Ids.join(list(workers.map([rows[:4], rows[4:]]))), one)


def test_a_worker_is_told_everything(tokenizer: Any) -> None:
    for strings_, conversations in ((True, False), (False, True), (True, True)):
        for rule in ("auto", "true", "false"):
            coder = Coder(tokenizer, rule, DAY, strings=strings_, conversations=conversations)
            told = coder_from(setup_of(coder))
            assert told.digest() == coder.digest()
            assert told.encoder.by_words == coder.encoder.by_words


def test_a_dead_worker_is_an_error(tokenizer: Any) -> None:
    with Workers(Coder(tokenizer, "auto", DAY), 1) as workers:
        results = workers.map([strings(2)] * 4)
        next(results)
        workers.processes[0].kill()
        with pytest.raises(ValueError, match="exit code -9.*Set dataset_num_proc to fewer"):
            list(results)
    assert all(process.poll() is not None for process in workers.processes)


def test_leaving_does_not_wait_for_a_worker(tokenizer: Any) -> None:
    began = time.monotonic()
    with Workers(Coder(tokenizer, "auto", DAY), 1) as workers:
        os.kill(workers.processes[0].pid, signal.SIGSTOP)
        rescue = threading.Timer(20, os.kill, (workers.processes[0].pid, signal.SIGCONT))
        rescue.start()
        job = workers.threads.submit(workers._ask, strings(2))
    rescue.cancel()
    assert time.monotonic() - began < 10 and isinstance(job.exception(), ValueError)


def test_tokenizers_that_cannot_be_sent_stay(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import ByT5Tokenizer

    monkeypatch.setattr(tokenize, "Workers", None)  # would fail when called
    with caplog.at_level("INFO"):
        ids = make_ids(Coder(ByT5Tokenizer(), "auto", DAY), strings(4), 2, False)
    assert len(ids.alone) == 4 and "dataset_num_proc has no effect" in caplog.text


PARENT = """
import datetime, json, sys, time
from pathlib import Path
from types import SimpleNamespace
from tokenizers import Tokenizer
from fastpref.data.coder import CHUNK, Coder, Ids, row_digest
from fastpref.data.tokencache import cached_ids
from fastpref.data.workers import Workers

tokenizer = SimpleNamespace(
    eos_token="<|end|>", split_special_tokens=False, special_tokens_map={"eos_token": "<|end|>"}
)
backend = Tokenizer.from_file(sys.argv[1])
coder = Coder(tokenizer, "auto", datetime.date.today(), backend=backend)
rows = [json.dumps(["a" * (n % 997) + str(n), " No", " Yes", None, None]) for n in range(10**5)]

def make():
    with Workers(coder, 2) as workers:
        print(*(process.pid for process in workers.processes), flush=True)
        jobs = [rows[at : at + CHUNK] for at in range(0, len(rows), CHUNK)]
        return Ids.join(list(workers.map(jobs)))

cached_ids(Path(sys.argv[2]), coder, list(map(row_digest, rows)), rows, make)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_of_a_killed_run(
    tokenizer: Any, tmp_path: Path, number: signal.Signals
) -> None:
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "cache").mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "tokenizer.json"), str(tmp_path / "cache")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C goes to all of its group
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert parent.stdout and parent.stderr
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and os.getsid(parent.pid) not in map(os.getsid, pids)
    time.sleep(0.3)
    os.killpg(parent.pid, number)
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == -number
    assert errors.count("Traceback") <= 1  # the parent's, of KeyboardInterrupt
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/stat").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [pid for pid in pids if Path(f"/proc/{pid}/stat").exists()]
    assert list((tmp_path / "cache").iterdir()) == []
