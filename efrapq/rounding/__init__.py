"""Rounding: the objective and its solvers, as pure functions on tensors."""

from efrapq.rounding.chain import kernel_package
from efrapq.rounding.coordinate import Coordinate, solve_coordinate, solve_within
from efrapq.rounding.gram import exact_integers
from efrapq.rounding.greedy import Factor, factorize
from efrapq.rounding.problem import Moments, RoundingProblem, make_problem, quadratic_loss, row_losses
from efrapq.rounding.relaxed import Relaxed, solve_relaxed
from efrapq.rounding.scale import refitted_scale, searched_scale

__all__ = [
    "Coordinate",
    "Factor",
    "Moments",
    "Relaxed",
    "RoundingProblem",
    "exact_integers",
    "factorize",
    "kernel_package",
    "make_problem",
    "quadratic_loss",
    "refitted_scale",
    "row_losses",
    "searched_scale",
    "solve_coordinate",
    "solve_relaxed",
    "solve_within",
]
