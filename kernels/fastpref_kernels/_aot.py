"""Ahead-of-time compilation of Triton kernels for NVIDIA GPUs, on a machine without one.

Every module with kernels offers `aot_cases() -> list[AotCase]`. The triton wheel brings ptxas,
cuobjdump and nvdisasm; what they say of registers, spills and widths of loads is all that can be
known before a GPU is at hand. Works with triton 3.6 and later. TRITON_INTERPRET must not be set
when the kernels are imported: an interpreted function cannot be compiled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ._launch import Launch

# Shared memory a block may have, bytes (CUDA C programming guide, table of compute capabilities).
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
}


@dataclass(frozen=True)
class AotCase:
    """One specialisation of a kernel."""

    name: str  # unique, for people
    kernel: Any  # triton.jit function
    signature: Mapping[str, str]  # argument -> "*fp32", "*bf16", "*i64", "i32", "fp32", ...
    constexprs: Mapping[
        str, Any
    ]  # argument -> value; with `signature` every argument of the kernel
    divisible: tuple[str, ...] = ()  # pointers and integers that are multiples of 16
    warps: int = 4
    stages: int = 2
    archs: tuple[int, ...] = (90,)
    wide_loads: bool = False  # all but single numbers is to be loaded 16 bytes at a time,
    wide_stores: bool = False  # or stored


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel needs of the GPU. Widths count instructions by bits a thread moves."""

    registers: int  # per thread
    spills: int  # bytes of stack per thread
    shared: int  # bytes per block
    loads: dict[int, int]  # bits -> global load instructions (LDG, LDGSTS)
    stores: dict[int, int]


def case_of(name: str, launch: Launch, archs: tuple[int, ...] = (90,)) -> AotCase:
    """The specialisation that Triton would compile for a launch (`_launch.recorded`): integers and
    addresses that are multiples of 16 are known to be, a 1 is a constant, None too."""
    signature, constexprs, divisible = {}, {}, []
    for parameter in launch.kernel.params:
        argument, value = parameter.name, launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        if (
            parameter.is_constexpr
            or value is None
            or (special and type(value) is int and value == 1)
        ):
            constexprs[argument] = value
        elif isinstance(value, torch.Tensor):
            signature[argument] = f"*{_TYPES[value.dtype]}"
            if not parameter.do_not_specialize_on_alignment:
                divisible.append(argument)
        else:
            by_value = "fp32" if isinstance(value, float) else "i32"
            signature[argument] = parameter.annotation_type or by_value
            if special and value % 16 == 0:
                divisible.append(argument)
    return AotCase(
        name,
        launch.kernel,
        signature,
        constexprs,
        tuple(divisible),
        launch.warps,
        launch.stages,
        archs,
    )


def compile_case(case: AotCase, arch: int) -> Compiled:
    """Compile `case` for sm_<arch>. ValueError where the signature does not cover the arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    known = {**case.signature, **{name: "constexpr" for name in case.constexprs}}
    if set(known) != set(names):
        raise ValueError(
            f"{case.name}: the case must cover the kernel's arguments; missing "
            f"{sorted(set(names) - set(known))}, unknown {sorted(set(known) - set(names))}."
        )
    source = ASTSource(
        fn=case.kernel,
        signature={name: known[name] for name in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    # Fusing of multiply and add is the default that Triton is about to drop; see measured-facts.
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _inspect(kernel.asm["cubin"], int(kernel.metadata.shared))


def _inspect(cubin: bytes, shared: int) -> Compiled:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory(prefix="fastpref-aot-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", path)
        listing = _output(tools / "nvdisasm", "-c", path)
    return Compiled(
        registers=int(_field("REG", usage)),
        spills=int(_field("STACK", usage)),
        shared=max(shared, int(_field("SHARED", usage))),
        loads=_widths(listing, "LDG"),
        stores=_widths(listing, "STG"),
    )


def _output(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def _field(name: str, usage: str) -> str:
    found = re.search(rf"\b{name}:(\d+)", usage)
    if not found:
        raise ValueError(f"cuobjdump --dump-resource-usage shows no {name}: {usage[:300]!r}")
    return found.group(1)


def _widths(listing: str, opcode: str) -> dict[int, int]:
    """bits -> count of global memory instructions; 32 where the name shows no width."""
    found: Counter[int] = Counter()
    for suffixes in re.findall(rf"\b{opcode}(?:STS)?((?:\.\w+)*)", listing):
        parts = suffixes.split(".")
        bits = [
            int(part.lstrip("US"))
            for part in parts
            if re.fullmatch(r"[US]?(8|16|64|128|256)", part)
        ]
        found[bits[0] if bits else 32] += 1
    return dict(sorted(found.items()))
