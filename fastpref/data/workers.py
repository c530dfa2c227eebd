"""Tokenising in several processes that never outlive their parent.

A worker is `python -m fastpref.data.workers`: it reads jobs from its standard input until that ends
and writes answers to its standard output. It ends when the parent does, however that comes about:
the system closes the pipe. Nothing of the parent is inherited or pickled; jobs are JSON, answers
JSON and the bytes of arrays. A worker is out of the terminal's reach, so that Ctrl-C is the
parent's alone.
"""

from __future__ import annotations

import datetime
import json
import os
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import SimpleNamespace, TracebackType
from typing import IO, Any

import numpy as np

from fastpref.data.coder import Coder, Ids

LENGTH = struct.Struct("<Q")
QUEUED = 2  # jobs per worker that are under way or waiting


class Workers:
    """``count`` processes that turn rows into ids as ``coder`` does; a context manager.

    Leaving it ends the processes at once, whatever they are doing.
    """

    def __init__(self, coder: Coder, count: int) -> None:
        self.setup = json.dumps(setup_of(coder)).encode()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "fastpref.data.workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
            for _ in range(count)
        ]
        self.threads = ThreadPoolExecutor(count)
        self.idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self.fresh = set(self.processes)
        for process in self.processes:
            self.idle.put(process)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes:
            process.kill()
        self.threads.shutdown(wait=True, cancel_futures=True)
        for process in self.processes:
            process.communicate()

    def map(self, jobs: Iterable[Sequence[str]]) -> Iterator[Ids]:
        """The ids of each job's rows, in the order of the jobs.

        Raises ValueError where a worker died.
        """
        waiting: deque[Future[Ids]] = deque()
        for rows in jobs:
            waiting.append(self.threads.submit(self._ask, rows))
            if len(waiting) >= QUEUED * len(self.processes):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _ask(self, rows: Sequence[str]) -> Ids:
        process = self.idle.get()
        assert process.stdin and process.stdout
        try:
            if process in self.fresh:
                self.fresh.discard(process)
                _send(process.stdin, self.setup)
            _send(process.stdin, "\n".join(rows).encode())
            return _ids_from(process.stdout)
        except (BrokenPipeError, EOFError):
            raise ValueError(
                f"a process that tokenises ended by itself, with exit code {process.wait()} (below "
                "0: ended by the system, as when memory is short). Set dataset_num_proc to fewer, "
                "or to 1."
            ) from None
        finally:
            self.idle.put(process)


def setup_of(coder: Coder) -> dict[str, Any]:
    """What a worker needs to be told to do as ``coder`` does."""
    tokenizer = coder.encoder.tokenizer
    return {
        "backend": coder.encoder.serialized,
        "special": tokenizer.special_tokens_map,
        "split_special_tokens": bool(tokenizer.split_special_tokens),
        "chat_template": getattr(tokenizer, "chat_template", None),
        "append_eos": coder.append_eos,
        "day": coder.day.isoformat(),
        "strings": coder.strings,
        "conversations": coder.conversations,
    }


def coder_from(setup: dict[str, Any]) -> Coder:
    """The coder whose `setup_of` this is."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(setup["backend"])
    tokenizer: Any = SimpleNamespace(
        eos_token=setup["special"].get("eos_token"),
        split_special_tokens=setup["split_special_tokens"],
    )
    if setup["conversations"]:  # else there is no need to import so much
        from transformers import PreTrainedTokenizerFast

        # It may change its copy of the backend; what encodes is the one that was sent.
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            split_special_tokens=setup["split_special_tokens"],
            **setup["special"],
        )
        tokenizer.chat_template = setup["chat_template"]
    return Coder(
        tokenizer,
        setup["append_eos"],
        datetime.date.fromisoformat(setup["day"]),
        strings=setup["strings"],
        conversations=setup["conversations"],
        backend=backend,
    )


def _send(pipe: IO[bytes], *parts: bytes) -> None:
    for part in parts:
        pipe.write(LENGTH.pack(len(part)))
        pipe.write(part)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes:
    """The next part; EOFError where the other end is gone."""
    size = pipe.read(LENGTH.size)
    if len(size) < LENGTH.size:
        raise EOFError
    (count,) = LENGTH.unpack(size)
    data = pipe.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _ids_from(pipe: IO[bytes]) -> Ids:
    faults = {int(row): (why[0], why[1]) for row, why in json.loads(_receive(pipe)).items()}
    values, lengths, alone = (_receive(pipe) for _ in range(3))
    return Ids(
        np.frombuffer(values, np.int32),
        np.frombuffer(lengths, np.int64).reshape(-1, 3),
        np.frombuffer(alone, np.int64),
        faults,
    )


def serve(jobs: IO[bytes], answers: IO[bytes]) -> None:
    """Answer jobs until there are no more, or nobody who would read the answers."""
    try:
        coder = coder_from(json.loads(_receive(jobs)))
        while True:
            ids = coder.ids(_receive(jobs).decode().split("\n"))
            arrays = (ids.values, ids.lengths, ids.alone)
            _send(answers, json.dumps(ids.faults).encode(), *(a.tobytes() for a in arrays))
    except (EOFError, BrokenPipeError):
        pass


if __name__ == "__main__":
    # What a library prints must not get among the answers.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, channel)
    os._exit(0)  # nobody reads what is left in buffers
