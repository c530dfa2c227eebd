"""Models and tokenizers by name: the Hub's, local folders' and fastpref-tiny, as transformers reads
them; safetensors only, no code from elsewhere, nothing missing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastpref import base, dist
from fastpref.architecture import check_architecture


@dataclass(frozen=True)
class Source:
    """Where a model is, and which option of the configuration says so."""

    option: str
    name: str  # a folder, a Hub name, or fastpref-tiny
    revision: str | None = None  # the Hub's branch, tag or commit

    def __str__(self) -> str:
        return f"{self.option}={self.name!r}"

    def locate(self) -> tuple[str, dict[str, Any]]:
        """What transformers' `from_pretrained` takes: a folder, or a Hub name with the commit."""
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()  # a bar per checkpoint would break up the run's own
        options: dict[str, Any] = {"trust_remote_code": False}
        name = str(Path(self.name).expanduser()) if self.name.startswith("~") else self.name
        if base.is_base_name(name):
            self._refuse_revision("is made here")
            if dist.is_main():
                base.base_dir()  # made by one rank, found by the others
            dist.barrier()
            return str(base.base_dir()), options
        if Path(name).is_dir():
            self._refuse_revision("is a folder")
        elif name.startswith(("/", ".")) or name.count("/") > 1:  # no Hub name can be like that
            raise ValueError("there is no such folder.")
        else:  # one commit for all files, whatever is pushed meanwhile
            options["revision"] = _commit(name, self.revision)
        return name, options

    def _refuse_revision(self, why: str) -> None:
        if self.revision is not None:
            raise ValueError(
                f"{self} {why} and has no revisions, but {self.revision!r} is asked for. Leave the "
                "revision away, or give the model's name on the Hub."
            )


def read_tokenizer(source: Source) -> Any:
    """The tokenizer of ``source``; ValueError where there is none."""
    from transformers import AutoTokenizer

    with _loading(source):
        name, options = source.locate()
        return AutoTokenizer.from_pretrained(name, **options)


def read_model_config(source: Source, max_length: int) -> tuple[Any, str, dict[str, Any]]:
    """transformers' configuration of ``source``, and where its files are, as `Source.locate` says;
    ValueError for an architecture that packing would get wrong."""
    from transformers import AutoConfig

    with _loading(source):
        name, options = source.locate()
        model_config = AutoConfig.from_pretrained(name, **options)
    try:
        check_architecture(model_config, max_length)
    except ValueError as refusal:  # a reference is refused as well, and may be of the same class
        raise ValueError(f"{source}: {refusal}") from None
    return model_config, name, options


def read_weights(
    source: Source,
    dtype: torch.dtype,
    max_length: int,
    device: torch.device,
    more: Mapping[str, Any] | None = None,  # what `from_pretrained` is told beside
) -> tuple[Any, str]:
    """The causal LM of ``source`` on the CPU, and what names these very weights.

    Whatever is on the disk (bfloat16, float16, shards) becomes ``dtype``. Raises ValueError for an
    architecture that packing would get wrong, and for weights that are not safetensors or not all
    there: pickled weights can run anything, and transformers fills gaps with random numbers.
    """
    from transformers import AutoModelForCausalLM

    _, name, options = read_model_config(source, max_length)
    identity = weights_identity(name, options.get("revision"), device)
    with _loading(source):
        module, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True,
            **options, **(more or {}),
        )  # fmt: skip
    absent = sorted([*found["missing_keys"], *map(str, found.get("mismatched_keys", ()))])
    if absent:
        raise ValueError(
            f"{source}: {len(absent)} weights are not in its files, the first being {absent[0]}. "
            f"{_what_is_absent(module, absent)}"
        )
    return module, identity


def _what_is_absent(module: Any, absent: Sequence[str]) -> str:
    """What to do about weights that the files lack, by name."""
    head = module.get_output_embeddings()
    names = {name for name, p in module.named_parameters() if head and p is head.weight}
    if set(absent) == names:
        return (
            f"It is a model without an output head (saved as {module.config.architectures}), and "
            "a random one would take its place: name the causal language model itself."
        )
    return "The files are not whole: get them again."


def weights_identity(name: str, commit: str | None, device: torch.device) -> str:
    """Names the very weights: the Hub's commit, or the digests of the local safetensors files.

    Rank 0 looks at the files, on behalf of all.
    """
    if commit is not None:
        return f"{name}@{commit}"
    folder = Path(name)
    identity = ""
    if dist.is_main():
        files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
        with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock alone
            digests = zip(files, pool.map(_sha256, files), strict=True)
            lines = "".join(f"{file.name}:{digest}\n" for file, digest in digests)
        identity = f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
    return dist.broadcast_text(identity, device)


def _commit(name: str, revision: str | None) -> str:
    """The commit that ``revision`` (None: the newest) of a Hub name stands for.

    From where the Hub's cache puts its files: what else transformers tells of it differs from
    version to version.
    """
    from transformers.utils import cached_file

    file = Path(cached_file(name, "config.json", revision=revision)).as_posix()
    found = re.search(r"/snapshots/([0-9a-f]{40})/", file)
    if not found:
        raise ValueError(f"{file} does not tell which commit of {name} it is")
    return found[1]


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def _loading(source: Source) -> Iterator[None]:
    """transformers' and safetensors' many ways of saying that something is wrong, as one."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{source} cannot be loaded: {error}\nExpected: a folder with config.json, "
            f"model.safetensors and a tokenizer, a Hub name, or {base.BASE_NAME!r}. Pickled "
            "weights (pytorch_model.bin) are not read: transformers' save_pretrained makes "
            "safetensors of them."
        ) from error
