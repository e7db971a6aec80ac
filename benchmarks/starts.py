"""How good the solver's optimum is: starts, orders, pair moves, restarts, and what follows the layer.

    python benchmarks/starts.py

On layers of ResNet-20 with published weights and 512 CIFAR-10 images, λ_E = 0: L_A relative to a descent from nearest
until nothing flips, geometric mean over layers, and the seconds it took on one core. Then, for some layers, the same
with the rows weighted by where the ReLU behind them is active. Needs CIFAR-10 (see common.py). Writes
results/starts.json.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import efrapq
import efrapq.stream.layer as layer_module
from benchmarks.common import machine, resnet20, save, shared_folder, show
from efrapq.rounding import Coordinate, RoundingProblem, factorize, quadratic_loss, row_losses, solve_coordinate
from efrapq.rounding.coordinate import _Descent, _sweep

PLAIN = Coordinate(lambda_e=0.0, sweeps=30)
LAYERS = (1, 3, 4, 8, 10, 12, 14, 15, 16)
MASKED = (1, 3, 4, 8)


@dataclass
class Captured:
    """A layer's problem, and rows of its inputs with the float outputs they should give, bias included."""

    name: str
    problem: RoundingProblem
    x_hat: Tensor
    y: Tensor
    bias: Tensor


def capture(bits: int) -> list[Captured]:
    """The problems of a defend run, in order."""
    folder = shared_folder()
    if folder is None:
        raise SystemExit("no development data: set EFRAPQ_SHARED")
    found: list[Captured] = []
    rows: dict[int, list[tuple[Tensor, Tensor]]] = {}
    work = layer_module.LayerWork
    add, choose = work.add, work._choose

    def keep_rows(self: Any, x_hat: Tensor, y: Tensor) -> None:
        add(self, x_hat, y)
        if y.ndim == 4:
            positions = torch.arange(0, y.shape[2] * y.shape[3], 7)
            grid = self.input_grid
            codes = self._unfold.input_rows(x_hat, self._kernel, positions, grid.zero_point)
            kept = (grid.dequantize(codes)[0], self._unfold.output_rows(y, positions)[0])
            rows.setdefault(id(self), []).append(kept)

    def keep_problem(self: Any, problem: RoundingProblem, relaxed: Any) -> tuple[Tensor, float]:
        parts = rows.pop(id(self), [(torch.empty(0), torch.empty(0))])
        x_hat, y = (torch.cat(list(kind)) for kind in zip(*parts, strict=True))
        found.append(Captured(self.layer.name, problem, x_hat, y, self.bias))
        result: tuple[Tensor, float] = choose(self, problem, relaxed)
        return result

    work.add, work._choose = keep_rows, keep_problem  # type: ignore[method-assign]
    net = resnet20(folder)
    efrapq.defend(net.model, None, bits=bits, calib=net.data, preprocess=net.preprocess)
    work.add, work._choose = add, choose  # type: ignore[method-assign]
    return found


def permuted(problem: RoundingProblem, order: Tensor) -> Tensor:
    """The descent from nearest with the columns visited in another order."""
    moved = replace(
        problem,
        weight=problem.weight[..., order],
        floor=problem.floor[..., order],
        residue=problem.residue[..., order],
        movable=problem.movable[..., order],
        nearest=problem.nearest[..., order],
        H=problem.H[:, order][:, :, order],
        cross=problem.cross[..., order],
        factor=None,
    )
    return solve_coordinate(moved, replace(PLAIN, start="nearest"))[..., order.argsort()]


def unguarded(problem: RoundingProblem, up: Tensor) -> Tensor:
    """A descent that may start, and end, above nearest."""
    descent = _Descent(problem, replace(PLAIN, start="nearest"))
    flat = up.transpose(1, 2).contiguous()
    R, _ = descent._state(flat)
    while _sweep(R, descent.H, descent.scale, flat, 0 * descent.pull, descent.curvature, PLAIN.block):
        pass
    return flat.transpose(1, 2).contiguous()


def restarted(problem: RoundingProblem, times: int) -> Tensor:
    """The best rows of several descents from nearest in random orders."""
    tries = []
    for seed in range(times):
        generator = torch.Generator().manual_seed(seed)
        tries.append(permuted(problem, torch.randperm(problem.weight.shape[2], generator=generator)))
    best = torch.stack([row_losses(problem, t) for t in tries]).argmin(0)
    return torch.stack(tries).gather(0, best[None, ..., None].expand(1, *tries[0].shape))[0]


def with_pairs(problem: RoundingProblem, up: Tensor, partners: int = 8, rounds: int = 5) -> Tensor:
    """Flip two weights of a row at once where that helps: each column with those it is most correlated with."""
    H = problem.H[0].float()
    diagonal = H.diagonal().clamp_min(1e-20)
    correlation = (H / (diagonal[:, None] * diagonal).sqrt()).abs().fill_diagonal_(0)
    nearest = correlation.topk(min(partners, len(H) - 1), 1).indices
    scale, movable, up = problem.scale[0].float(), problem.movable[0], up[0].clone()
    for _ in range(rounds):
        R = (problem.delta(up[None])[0].float() @ H + problem.cross[0].float()).contiguous()
        flips = 0
        for j in range(len(H)):
            other = nearest[j]
            step, steps = (1 - 2 * up[:, j].float()) * scale, (1 - 2 * up[:, other].float()) * scale[:, None]
            change = (2 * step * R[:, j] + step * step * diagonal[j])[:, None] + 2 * steps * R[:, other]
            change += steps * steps * diagonal[other] + 2 * step[:, None] * steps * H[j, other]
            change = torch.where(movable[:, other] & movable[:, j, None], change, 0.0)
            gain, which = change.min(1)
            rows = (gain < -1e-12).nonzero()[:, 0]
            if len(rows):
                flips += len(rows)
                partner = other[which[rows]]
                up[rows, j] ^= True
                up[rows, partner] ^= True
                R[rows] += step[rows, None] * H[j] + steps[rows, which[rows], None] * H[partner]
        up = solve_coordinate(problem, PLAIN, start=up[None])[0]
        if flips == 0:
            break
    return up[None]


def best_single_moves(problem: RoundingProblem, up: Tensor) -> Tensor:
    """Steepest descent: every row flips its own best weight, again and again."""
    H, up = problem.H[0].float(), up[0].clone()
    scale, movable, rows = problem.scale[0].float()[:, None], problem.movable[0], torch.arange(len(up))
    R = problem.delta(up[None])[0].float() @ H + problem.cross[0].float()
    for _ in range(20 * up.shape[1]):
        step = (1 - 2 * up.float()) * scale
        gain, column = torch.where(movable, 2 * step * R + step * step * H.diagonal(), 0.0).min(1)
        better = gain < -1e-12
        if not bool(better.any()):
            break
        r, c = rows[better], column[better]
        R[r] += step[r, c][:, None] * H[c]
        up[r, c] ^= True
    return up[None]


def ways(problem: RoundingProblem) -> dict[str, Callable[[], Tensor]]:
    """Everything that is compared, by name."""
    diagonal = problem.H[0].diagonal()
    from_nearest = replace(PLAIN, start="nearest")
    return {
        "nearest": lambda: problem.nearest,
        "descent from nearest": lambda: solve_coordinate(problem, from_nearest),
        "… 3 sweeps of it": lambda: solve_coordinate(problem, replace(from_nearest, sweeps=3)),
        "… diagonal of H falling": lambda: permuted(problem, diagonal.argsort(descending=True)),
        "… diagonal of H rising": lambda: permuted(problem, diagonal.argsort()),
        "… best of 4 random orders": lambda: restarted(problem, 4),
        "… and pairs": lambda: with_pairs(problem, solve_coordinate(problem, from_nearest)),
        "steepest descent from nearest": lambda: best_single_moves(problem, problem.nearest),
        "descent from all flipped": lambda: unguarded(problem, ~problem.nearest & problem.movable),
        "greedy": lambda: solve_coordinate(problem, replace(PLAIN, sweeps=0)),
        "greedy, 2 sweeps (the default)": lambda: solve_coordinate(problem, replace(PLAIN, sweeps=2)),
        "greedy, swept to the end": lambda: solve_coordinate(problem, PLAIN),
        "greedy and pairs": lambda: with_pairs(problem, solve_coordinate(problem, PLAIN)),
    }


def masked(found: Captured) -> tuple[float, float, float, float]:
    """Error behind the ReLU on rows not solved for, and seconds: of the plain quadratic, and of one per output row
    whose samples are weighted by whether the float output is active. Returns (plain, masked, seconds, seconds)."""
    problem = found.problem
    half = len(found.x_hat) // 2
    x, y = found.x_hat[:half], found.y[:half]
    weight = problem.weight[0]
    bias = found.bias
    changed = x @ weight.t() + bias - y
    outputs, inputs = weight.shape

    def solve(H: Tensor, cross: Tensor) -> Tensor:
        """Rows as groups of one, so that each may have an H of its own."""
        rows = replace(
            problem,
            weight=weight[:, None],
            scale=problem.scale[0][:, None],
            floor=problem.floor[0][:, None],
            residue=problem.residue[0][:, None],
            movable=problem.movable[0][:, None],
            nearest=problem.nearest[0][:, None],
            H=H.double(),
            cross=cross.double()[:, None],
            factor=factorize(H.double(), cross.double()[:, None]),
        )
        return solve_coordinate(rows, Coordinate(lambda_e=0.0))[:, 0]

    started = time.perf_counter()
    shared = (x.t() @ x / half).expand(outputs, inputs, inputs)
    plain = solve(shared, changed.t() @ x / half)
    middle = time.perf_counter()
    active = (y > 0).float()
    own = torch.stack([(x * active[:, o, None]).t() @ x / half for o in range(outputs)])
    weighted = solve(own + 1e-3 * shared, (changed * active).t() @ x / half)
    ended = time.perf_counter()

    def behind(up: Tensor) -> float:
        real = (problem.floor[0] + up) * problem.scale[0][:, None]
        out = found.x_hat[half:] @ real.t() + bias
        return float((out.relu() - found.y[half:].relu()).square().sum(1).mean())

    return behind(plain), behind(weighted), middle - started, ended - middle


def main() -> None:
    torch.set_num_threads(1)
    document: dict[str, Any] = {"machine": machine()}
    for bits in (4, 8):
        captured = capture(bits)
        ratios: dict[str, list[float]] = {}
        seconds: dict[str, float] = {}
        for index in LAYERS:
            problem = replace(captured[index].problem, factor=None)
            losses = {}
            for name, run in ways(problem).items():
                started = time.perf_counter()
                up = run()
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
                losses[name] = quadratic_loss(problem, up)
            for name, loss in losses.items():
                ratios.setdefault(name, []).append(loss / losses["descent from nearest"])
        mean = {name: math.exp(sum(map(math.log, r)) / len(r)) for name, r in ratios.items()}
        document[f"W{bits}A8"] = {"ratio": mean, "seconds": seconds}
        save("starts", document)
        rows = [(name, f"{mean[name]:.4f}", f"{seconds[name]:.2f}") for name in mean]
        show(f"W{bits}A8: {len(LAYERS)} layers of ResNet-20", ("way", "L_A", "seconds"), rows)
        rows = []
        for index in MASKED:
            plain, weighted, quick, slow = masked(captured[index])
            document[f"W{bits}A8"].setdefault("masked", {})[captured[index].name] = [plain, weighted, quick, slow]
            rows.append((captured[index].name, f"{plain:.4g}", f"{weighted:.4g}", f"{slow / quick:.1f}×"))
        save("starts", document)
        show(f"W{bits}A8: error behind the ReLU, other rows", ("layer", "plain", "active outputs", "time"), rows)


if __name__ == "__main__":
    main()
