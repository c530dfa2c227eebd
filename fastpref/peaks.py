"""Peak rates of devices: dense products of bfloat16 numbers with float32 sums, TFLOP/s.

From NVIDIA's data sheets and architecture white papers, at boost clock and without sparsity (half
of what the sheets call "with sparsity"); of consumer cards the rate with float32 sums, half of that
with float16 sums. float16 has the same. float32 and float64 have other rates, which are not here.
"""

from __future__ import annotations

import re

# The first pattern found in the device's name counts, so variants stand before their family.
# fmt: off
TFLOPS: tuple[tuple[str, float], ...] = (
    (r"GB300|GB200", 2500.0),      # NVIDIA GB200/GB300 NVL72: 5 PFLOP/s with sparsity
    (r"B300|B200", 2250.0),        # HGX B200/B300: 4.5 with sparsity
    (r"B100", 1750.0),             # HGX B100: 3.5 with sparsity
    (r"GH200", 989.4),             # as H100 SXM
    (r"H200 NVL", 835.5),          # H200 NVL: 1671 with sparsity
    (r"H200", 989.4),              # H200 SXM: 1979 with sparsity
    (r"H100 NVL", 835.5),          # H100 NVL: 1671 with sparsity
    (r"H100 PCIe", 756.0),         # H100 PCIe: 1513 with sparsity
    (r"H100|H800", 989.4),         # H100 SXM5, Hopper white paper
    (r"H20\b", 148.0),
    (r"A100|A800", 312.0),         # Ampere white paper
    (r"A40\b", 149.7),
    (r"A30\b", 165.0),
    (r"A10G", 70.0),
    (r"A10\b", 125.0),
    (r"L40S", 362.0),              # 733 with sparsity
    (r"L40\b", 181.0),
    (r"L4\b", 121.0),              # 242 with sparsity
    (r"RTX 6000 Ada", 364.2),
    (r"RTX A6000", 154.8),
    (r"RTX 5090", 209.5),          # RTX Blackwell white paper
    (r"RTX 4090", 165.2),          # Ada white paper
    (r"RTX 4080", 97.5),
    (r"RTX 3090 Ti", 80.0),        # Ampere GA102 white paper
    (r"RTX 3090", 71.0),
)
# fmt: on


def peak_tflops(device: str, dtype: str) -> float | None:
    """TFLOP/s of a device by the name that CUDA gives it, for products in ``dtype`` ("bfloat16" or
    "float16"); None where it is not known, which is no guess."""
    if dtype not in ("bfloat16", "float16"):
        return None
    for pattern, rate in TFLOPS:
        if re.search(rf"\b{pattern}", device, re.IGNORECASE):
            return rate
    return None
