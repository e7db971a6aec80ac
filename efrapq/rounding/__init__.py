"""Rounding: the objective and its solvers, as pure functions on tensors."""

from efrapq.rounding.coordinate import Coordinate, solve_coordinate
from efrapq.rounding.problem import Moments, RoundingProblem, make_problem, quadratic_loss
from efrapq.rounding.relaxed import Relaxed, solve_relaxed

__all__ = [
    "Coordinate",
    "Moments",
    "Relaxed",
    "RoundingProblem",
    "make_problem",
    "quadratic_loss",
    "solve_coordinate",
    "solve_relaxed",
]
