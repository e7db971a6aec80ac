"""efrapq: quantize models from suppliers that one cannot trust.

    import efrapq

    defended = efrapq.defend("model.pt", "model.int4.onnx", bits=4, calib="images/")
    result = efrapq.verify("model.int4.onnx", data="test.npz", trigger="patch:6x6@24,24", target_class=0)

Rounding follows EFRAP (Li et al., "Nearest is Not Dearest", CVPR 2024, arXiv 2405.12725).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efrapq.hunt import defend_searched, search_trigger
    from efrapq.loading import load
    from efrapq.pipeline import defend
    from efrapq.retarget import export
    from efrapq.verification import verify

__all__ = ["defend", "defend_searched", "export", "load", "search_trigger", "verify"]

_HOME = {
    "defend": "efrapq.pipeline",
    "defend_searched": "efrapq.hunt",
    "export": "efrapq.retarget",
    "load": "efrapq.loading",
    "search_trigger": "efrapq.hunt",
    "verify": "efrapq.verification.verifier",
}


def __getattr__(name: str) -> Any:
    """Import a public function when it is first asked for: `efrapq --help` needs none of torch and onnxruntime."""
    if name not in _HOME:
        raise AttributeError(f"module 'efrapq' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
