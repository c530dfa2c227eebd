"""Checkpoints that are whole or not there: written aside, checked by digest, renamed into place.

    <run>/checkpoint-<step>/
      model.safetensors config.json tokenizer*   what AutoModelForCausalLM.from_pretrained reads;
                                                  with LoRA in place of the first two
      adapter_model.safetensors adapter_config.json   what PeftModel.from_pretrained reads
      reference/                                  a whole model, of a reference that moves
      optimizer.safetensors optimizer.json        tensors by parameter number; groups and scalars
      masters.safetensors                         float32 copies of bfloat16 weights, if any
      rng.safetensors                             generators of every rank, as tensors
      trainer_state.json                          step, schedule, counters of the loop, log_history
      manifest.json                               size and SHA-256 of every other file, written last

No pickle anywhere. A kill at any moment leaves at least the previous checkpoint usable: names that
start with `.tmp-` are leftovers of such a moment, and `latest_checkpoint` clears them away.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastpref import __version__, dist, lora
from fastpref.generators import gather_generators, restore_generators
from fastpref.masters import Masters
from fastpref.schedule import Schedule

log = logging.getLogger(__name__)

FORMAT = "fastpref-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
REFERENCE = "reference"
MASTERS = "masters.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
_REPLACED = re.compile(r"\.tmp-replaced-(checkpoint-\d+)-\d+")


@dataclass
class TrainState:
    """All that a run needs to go on. `module` and `tokenizer` are Hugging Face objects."""

    module: nn.Module
    tokenizer: Any | None
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    counters: dict[str, Any]  # of the loop; anything JSON can hold exactly
    reference: nn.Module | None = None  # one that follows the policy
    masters: Masters | None = None  # what the optimizer moves in the place of bfloat16 weights
    # Metrics under transformers' names, for scripts that plot them; never read back.
    log_history: list[dict[str, Any]] = field(default_factory=list)


def save_checkpoint(
    output_dir: str | os.PathLike[str],
    step: int,
    state: TrainState,
    save_total_limit: int | None = None,
    best_step: int | None = None,
) -> Path:
    """Write `checkpoint-<step>` and return its path. Every rank calls it; rank 0 writes.

    An existing checkpoint of that step is replaced; at every moment one of the two is whole on the
    disk. Afterwards `save_total_limit` stay: this one, that of `best_step`, then the newest.
    """
    root = Path(output_dir)
    target = root / f"checkpoint-{step}"
    generators = gather_generators(_device(state.module))
    if dist.is_main():
        root.mkdir(parents=True, exist_ok=True)
        aside = root / f".tmp-checkpoint-{step}-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir()
            _write(aside, step, state, generators)
            _seal(aside, step)
            _rename_into_place(aside, target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        if save_total_limit is not None:
            _prune(root, save_total_limit, {target, root / f"checkpoint-{best_step}"})
    dist.barrier()
    return target


def load_checkpoint(
    path: str | os.PathLike[str], state: TrainState, *, verify: bool = True
) -> dict[str, Any]:
    """Restore `state` in place, bit for bit, and this rank's generators; return the counters.

    `verify=False` skips the digests, for a path that `find_checkpoint` has just verified. Raises
    ValueError if a file is not what was written, or belongs to another model or optimizer.
    """
    folder = Path(path)
    if verify:
        verify_checkpoint(folder)
    _load_model(folder, state.module)
    if state.reference is not None:
        _load_model(folder / REFERENCE, state.reference)
    _load_optimizer(folder, state.optimizer)
    if state.masters is not None:
        _load_masters(folder, state.masters)
    saved = _read_json(folder / "trainer_state.json")
    state.schedule.load_state_dict(saved["schedule"])
    state.counters.clear()
    state.counters.update(saved["counters"])
    restore_generators(load_file(folder / "rng.safetensors"), folder)
    return state.counters


def load_weights(path: str | os.PathLike[str], module: nn.Module) -> None:
    """Copy the weights of the checkpoint `path`, verified, into `module`."""
    verify_checkpoint(Path(path))
    _load_model(Path(path), module)


def find_checkpoint(resume: str, output_dir: str | os.PathLike[str]) -> Path | None:
    """What `resume_from_checkpoint` means: "none", "auto" (newest whole one, if any) or a folder.

    The one returned is verified. Call it on rank 0 only: it clears leftovers away.
    """
    if resume == "none":
        return None
    if resume == "auto":
        return latest_checkpoint(output_dir)
    verify_checkpoint(Path(resume))
    return Path(resume)


def latest_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """Newest whole checkpoint of a run, None if it has none yet.

    Leftovers of a killed process are removed. A damaged checkpoint is passed over with a warning
    that names it and the damage. Raises ValueError if all there are are damaged: starting from
    scratch in silence would throw the run away.
    """
    root = Path(output_dir)
    if not root.is_dir():
        return None
    _clear_leftovers(root)
    refused: list[str] = []
    for _, folder in reversed(_checkpoints(root)):
        try:
            verify_checkpoint(folder)
        except ValueError as error:
            log.warning("passing over a damaged checkpoint: %s", error)
            refused.append(str(error))
            continue
        return folder
    if refused:
        raise ValueError(
            f"{root}: no checkpoint is whole: {'; '.join(refused)}. To start anew set "
            "overwrite_output_dir: true, or another output_dir"
        )
    return None


def verify_checkpoint(folder: Path) -> int:
    """Step of a checkpoint whose files all have the sizes and digests of its manifest.

    Raises ValueError naming the file, what was expected and what came.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a checkpoint folder, found none")
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder}: no {MANIFEST}; it was not written to its end by fastpref")
    manifest = _read_json(folder / MANIFEST)
    found = (manifest.get("format"), manifest.get("version"))
    if found != (FORMAT, FORMAT_VERSION):
        expected = (FORMAT, FORMAT_VERSION)
        raise ValueError(f"{folder / MANIFEST}: expected format {expected}, got {found}")
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file}: missing, though {MANIFEST} lists it")
        size = file.stat().st_size
        if size != entry["size"]:
            raise ValueError(f"{file}: expected {entry['size']} bytes, got {size}")
        digest = _sha256(file)
        if digest != entry["sha256"]:
            raise ValueError(
                f"{file}: content is not what was written (SHA-256 expected "
                f"{entry['sha256'][:12]}..., got {digest[:12]}...)"
            )
    return int(manifest["step"])


def remove_checkpoints_after(output_dir: str | os.PathLike[str], step: int) -> None:
    """Remove checkpoints of later steps, which a run resumed at `step` is about to contradict."""
    root = Path(output_dir)
    for number, folder in _checkpoints(root) if root.is_dir() else []:
        if number > step:
            _remove(folder)


def _write(folder: Path, step: int, state: TrainState, generators: dict[str, Tensor]) -> None:
    save_weights(state.module, folder)
    if state.reference is not None:
        save_weights(state.reference, folder / REFERENCE)
    if state.tokenizer is not None:
        state.tokenizer.save_pretrained(folder)
    tensors, layout = _split_optimizer_state(state.optimizer)
    save_file(tensors, folder / "optimizer.safetensors")
    _write_json(folder / "optimizer.json", layout)
    if state.masters is not None:
        save_file(state.masters.tensors, folder / MASTERS)
    save_file(generators, folder / "rng.safetensors")
    saved = {
        "global_step": step,
        "schedule": state.schedule.state_dict(),
        "counters": state.counters,
        "log_history": state.log_history,
    }
    _write_json(folder / "trainer_state.json", saved)


def save_weights(module: nn.Module, folder: Path) -> None:
    """The model in Hugging Face's layout; where it has an adapter, that alone in peft's."""
    if lora.is_adapted(module):
        lora.save(module, folder)
    else:
        module.save_pretrained(folder)  # type: ignore[operator]


def _seal(folder: Path, step: int) -> None:
    """Bring every file to the disk, then the manifest of them, then the folder itself."""
    files: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            _fsync(file)
            name = file.relative_to(folder).as_posix()
            files[name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
        else:
            _fsync(file)
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "fastpref": __version__,
        "step": step,
        "files": files,
    }
    _write_json(folder / MANIFEST, manifest)
    _fsync(folder / MANIFEST)
    _fsync(folder)


def _rename_into_place(aside: Path, target: Path) -> None:
    root = target.parent
    replaced = root / f".tmp-replaced-{target.name}-{os.getpid()}"
    if target.exists():
        # A folder cannot be renamed over a full one. Killed between the two renames, the old one
        # stands under this name, from which _clear_leftovers puts it back.
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(target, replaced)
    os.replace(aside, target)
    _fsync(root)
    shutil.rmtree(replaced, ignore_errors=True)


def _clear_leftovers(root: Path) -> None:
    for leftover in sorted(root.glob(".tmp-*")):
        match = _REPLACED.fullmatch(leftover.name)
        if match and not (root / match[1]).exists():
            os.replace(leftover, root / match[1])
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)


def _prune(root: Path, limit: int, keep: set[Path]) -> None:
    """Remove the oldest checkpoints beyond `limit`, but neither the newest nor any of `keep`."""
    folders = [folder for _, folder in _checkpoints(root)]
    keep = keep.intersection(folders) | set(folders[-1:])
    spare = len(folders) - max(limit, len(keep))
    for folder in [folder for folder in folders if folder not in keep][: max(spare, 0)]:
        _remove(folder)


def _remove(folder: Path) -> None:
    # Renamed first: killed while deleting, no half checkpoint is left under a good name.
    doomed = folder.parent / f".tmp-removed-{folder.name}-{os.getpid()}"
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything named like a checkpoint, oldest step first."""
    found = ((_NAME.fullmatch(child.name), child) for child in root.iterdir() if child.is_dir())
    return sorted((int(match[1]), child) for match, child in found if match)


def _load_model(folder: Path, module: nn.Module) -> None:
    """Copy the saved weights into `module`, by name; tied weights stand in the file once."""
    if lora.is_adapted(module):
        lora.load(module, folder)
        return
    own = module.state_dict()
    filled: set[int] = set()
    with torch.no_grad():
        for name, tensor in _saved_weights(folder, module, own):
            mine = own[name]
            if (mine.shape, mine.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(
                    f"{folder}: weight {name}: expected {tuple(mine.shape)} {mine.dtype}, got "
                    f"{tuple(tensor.shape)} {tensor.dtype}; is model_name_or_path another model?"
                )
            mine.copy_(tensor)
            filled.add(mine.data_ptr())
    missing = [name for name, mine in own.items() if mine.data_ptr() not in filled]
    if missing:
        raise ValueError(f"{folder}: weight {missing[0]} ({len(missing)} in all) is not saved")


def _saved_weights(
    folder: Path, module: nn.Module, own: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    files = sorted(folder.glob("model*.safetensors"))
    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as content:
            names.update(content.keys())
    if names <= own.keys():
        for file in files:
            with safe_open(file, framework="pt") as content:
                for name in content.keys():
                    yield name, content.get_tensor(name)
        return
    # Architectures whose files name weights otherwise than their modules do (fused experts):
    # transformers knows the way back.
    try:
        loaded = type(module).from_pretrained(folder, dtype="auto")  # type: ignore[attr-defined]
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{folder}: weights do not fit the model: {error}") from error
    for name, tensor in loaded.state_dict().items():
        if name not in own:
            raise ValueError(f"{folder}: weight {name} is not in the model; is it another one?")
        yield name, tensor


def _split_optimizer_state(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State tensors by "<parameter number>.<key>", and everything else as JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    places: set[int] = set()
    for number, entries in state["state"].items():
        for key, value in _flat(entries):
            if isinstance(value, Tensor):
                # bitsandbytes' tables of codes are shared by all weights; a file has no sharing.
                shared = value.numel() and value.data_ptr() in places
                tensors[f"{number}.{key}"] = value.clone() if shared else value.contiguous()
                places.add(value.data_ptr())
            else:
                scalars.setdefault(str(number), {})[key] = value
    layout = {
        "class": type(optimizer).__name__,
        "scalars": scalars,
        "param_groups": state["param_groups"],
    }
    return tensors, layout


def _flat(entries: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """bitsandbytes hides its quantised state in a dictionary of its own, and reads it without."""
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from value.items()
        else:
            yield key, value


def _load_masters(folder: Path, masters: Masters) -> None:
    file = folder / MASTERS
    if not file.is_file():
        raise ValueError(
            f"{folder}: saved without {MASTERS}; set master_weights and weights_dtype as they "
            "were, or resume_from_checkpoint: none"
        )
    try:
        masters.load(load_file(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    layout = _read_json(folder / "optimizer.json")
    own = optimizer.state_dict()["param_groups"]
    saved = layout["param_groups"]
    if layout["class"] != type(optimizer).__name__:
        raise ValueError(
            f"{folder}: saved with the optimizer {layout['class']}, but the run uses "
            f"{type(optimizer).__name__}; set optim as it was, or resume_from_checkpoint: none"
        )
    if [g.get("param_names") for g in saved] != [g.get("param_names") for g in own]:
        raise ValueError(
            f"{folder}: the optimizer's parameters are not the run's; set model_name_or_path, "
            "trainable and weight_decay as they were, or resume_from_checkpoint: none"
        )
    state: dict[int, dict[str, Any]] = {}
    for number, entries in layout["scalars"].items():
        state.setdefault(int(number), {}).update(entries)
    for name, tensor in load_file(folder / "optimizer.safetensors").items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = tensor
    for group, now in zip(saved, own, strict=True):
        # JSON has no tuples: betas, Adafactor's eps.
        group |= {name: tuple(group[name]) for name in now if isinstance(now[name], tuple)}
    optimizer.load_state_dict({"state": state, "param_groups": saved})
    # torch casts it to the weights' dtype; Adafactor's is float32 beside bfloat16 weights too.
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, entries in state.items():
        own_state = optimizer.state[weights[number]]
        for key, value in entries.items():
            if isinstance(value, Tensor) and own_state[key].dtype != value.dtype:
                own_state[key] = value.to(own_state[key].device)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _write_json(file: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: expected a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
