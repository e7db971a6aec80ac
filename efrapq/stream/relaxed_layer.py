"""The paper's solver on one layer of the stream: batches of its input and of what follows it, not their moments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from efrapq.errors import UnsupportedModelError
from efrapq.graph.layers import Layer
from efrapq.graph.unfold import unfold_for
from efrapq.grid import ActivationGrid
from efrapq.rounding import Relaxed, RoundingProblem, solve_relaxed

__all__ = ["solve_layer"]


def solve_layer(
    layer: Layer,
    problem: RoundingProblem,
    shape: tuple[int, ...],
    run: Callable[[Tensor, Tensor], Tensor],
    after: Callable[[Tensor], Tensor],
    output_grid: ActivationGrid | None,
    x_hat: Tensor,
    target: Tensor,
    settings: Relaxed,
    seed: int,
    on_step: Callable[[int], None],
) -> Tensor:
    """Descend on the layer's activations. Returns h, (G, O, D) bool.

    shape: of the weight in ONNX layout. run(x, weight): the layer with its bias; after: the activation function that
    its grid absorbs; output_grid: that grid. x_hat: all inputs of the quantized network; target: all outputs of the
    float network behind the activation function.
    """
    if len(x_hat) != len(target):
        raise UnsupportedModelError(f"layer {layer.name}: the relaxed solver needs one output per sample")
    unfold = unfold_for(layer)
    generator = torch.Generator().manual_seed(seed)

    def laid_out(rows: Tensor) -> Tensor:
        return unfold.from_rows(rows, shape).contiguous()

    def sample() -> tuple[Tensor, Tensor]:
        count = min(settings.batch, len(x_hat))
        picked = torch.randint(len(x_hat), (count,), generator=generator).to(x_hat.device)
        return x_hat[picked], target[picked]

    def forward(weight: Tensor, x: Tensor) -> Tensor:
        y = after(run(x, weight))
        return y if output_grid is None else output_grid.fake_quantize(y)

    with torch.enable_grad():
        up = solve_relaxed(
            laid_out(problem.floor),
            laid_out(problem.residue),
            laid_out(problem.steps.expand_as(problem.floor)),
            laid_out(problem.nearest),
            forward,
            sample,
            channel_dim=1 if len(shape) > 2 else -1,
            settings=settings,
            on_step=on_step,
        )
    return unfold.weight_rows(up)
