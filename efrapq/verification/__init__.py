"""Proof in the runtime that ships: accuracy, attack success, codes and kernels, as ONNX Runtime gives them."""

from efrapq.verification.verdict import Requirements
from efrapq.verification.verifier import Verification, verify

__all__ = ["Requirements", "Verification", "verify"]
