"""What the user of an exported file should know before running it: in words, from the codes and grids themselves."""

from __future__ import annotations

from efrapq.exporters.guard import GUARD_KEY
from efrapq.exporters.saturation import advice, saturating_layers
from efrapq.exporters.targets import profile
from efrapq.graph.quantized import QuantizedModel

__all__ = ["remarks"]


def remarks(quantized: QuantizedModel, target: str) -> list[str]:
    """Empty where the target holds the model as it was solved, and computes with it exactly."""
    rules = profile(target)
    found = []
    moved = sum(rules.grid(grid) != grid for grid in quantized.activations.values())
    if moved:
        found.append(
            f"{moved} of {len(quantized.activations)} activation grids were made anew from their recorded ranges, as "
            f"{target} wants them: measure this file with `efrapq verify`, the figures of another one are not its own"
        )
    saturating = saturating_layers(quantized) if rules.pair_sums_saturate else []
    if saturating:
        found.append(advice(saturating, len(quantized.layers)))
    if GUARD_KEY in quantized.metadata and not rules.guards:
        found.append(f"{target} takes no output that is computed from codes: its file has no guard")
    shape = quantized.model.graph.inputs[0].shape
    if rules.fixed_shapes and shape is not None and any(not isinstance(d, int) for d in shape):
        found.append(f"{target} compiles one shape: the batch is fixed at 1")
    return found
