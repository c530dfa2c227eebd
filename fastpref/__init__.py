"""Train language models on preference pairs, and see how each behavior drives the model."""

from __future__ import annotations

__version__ = "0.1.0"


def require_matching_kernels() -> str:
    """Version of `fastpref_kernels`, which must be this package's own.

    A checkout on the path can hide half of an installed wheel; mixed halves would compute with
    other signatures than they were tested with. Raises ImportError naming both. Imports torch.
    """
    import fastpref_kernels

    found = str(getattr(fastpref_kernels, "__version__", None))
    if found != __version__:
        raise ImportError(
            f"fastpref {__version__} ({__file__}) found fastpref_kernels {found} "
            f"({fastpref_kernels.__file__}); both come from one wheel or one checkout: reinstall, "
            "or leave the checkout's folder"
        )
    return found
