"""Why a quantized model is slower than float, and what to do about a file that does not load, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from efrapq.verification.kernels import KernelReport

if TYPE_CHECKING:
    import onnx

__all__ = ["loading_advice", "slower_because"]

INT4_TYPES = (21, 22)
INT4_OPSET, INT4_IR = 21, 10


def slower_because(latency: dict[str, float | None], kernels: KernelReport) -> str | None:
    """One sentence if the quantized model took longer than float, as far as the report knows; None if it did not."""
    before, after = latency["float"], latency["defended"]
    if before is None or after is None or not 0 < before < after:
        return None
    reasons = []
    if kernels.float:
        shares = [row.share for row in kernels.unfused if row.share is not None]
        part = f" ({100 * sum(shares):.1f} % of the MACs)" if len(shares) == kernels.float else ""
        reasons.append(f"{kernels.float} of {len(kernels.ops)} heavy operators run in float{part}")
    left = kernels.conversions
    if left["quantize"] + left["dequantize"] > 1:  # one QuantizeLinear at the input has to be
        expanded = f", {left['constants']} of them on constants at every inference" if left["constants"] else ""
        reasons.append(
            f"{left['quantize']} QuantizeLinear and {left['dequantize']} DequantizeLinear nodes are left{expanded}"
        )
    why = "; ".join(reasons) or (
        "the report knows no reason: all heavy operators are integer and no conversions are left; small models gain "
        "little, and CPUs without VNNI less"
    )
    return f"slower than float by a factor of {after / before:.2f}: {why}"


def loading_advice(model: onnx.ModelProto, reason: str) -> str:
    """What to do about a file that ONNX Runtime refused for this reason."""
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    int4 = any(t.data_type in INT4_TYPES for t in model.graph.initializer)
    if int4 and (opset < INT4_OPSET or model.ir_version < INT4_IR):
        return (
            f"int4 needs opset {INT4_OPSET} and IR version {INT4_IR}; this file says {opset} and {model.ir_version}: "
            f"export it again for opset {INT4_OPSET}"
        )
    if any(
        n.op_type == "QuantizeLinear" and len(n.input) > 2 and n.input[2] == t.name
        for t in model.graph.initializer
        if t.data_type in INT4_TYPES
        for n in model.graph.node
    ):
        return "4-bit activations: quantize to uint8 and Clip the codes to 0–15 in front of DequantizeLinear instead"
    lower = reason.lower()
    if "not a registered" in lower or "no op registered" in lower or "could not find an implementation" in lower:
        return (
            "this ONNX Runtime has not that operator: install a newer one, or export with operators of the standard "
            "opset; custom operators are not loaded"
        )
    if "ir version" in lower or "opset" in lower:
        return "install a newer ONNX Runtime, or export the model for an older opset (17 for int8, 21 for int4)"
    return "export the model again with a supported opset (17 for int8, 21 for int4), or try a newer ONNX Runtime"
