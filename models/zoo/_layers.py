"""What several architectures share: initialisation and the arithmetic of width multipliers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

__all__ = ["divisible", "he_initialize", "scaled", "solve_multiplier"]

_MAX_MULTIPLIER = 64.0
_MAX_DENOMINATOR = 1000


def he_initialize(model: nn.Module) -> None:
    """Draw the convolutions' weights from N(0, 2 / fan_out), in place (He et al. 2015, arXiv 1502.01852, eq. 14).

    Weights on the meta device are passed over: there is nothing to draw, and it costs torch a second of imports.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def scaled(channels: int, width: float) -> int:
    """`channels` times the multiplier, to the nearest whole number, at least one."""
    return max(1, math.floor(channels * width + 0.5))


def divisible(channels: int, width: float, divisor: int = 8) -> int:
    """`channels` times the multiplier, to the nearest multiple of `divisor` that loses no more than a tenth."""
    wanted = channels * width
    nearest = max(divisor, math.floor(wanted / divisor + 0.5) * divisor)
    return nearest if nearest >= 0.9 * wanted else nearest + divisor


def solve_multiplier(channels: Callable[[float], Sequence[int]], observed: Sequence[int]) -> float | None:
    """The simplest multiplier m with `channels(m) == observed`; None where there is none up to 64.

    Rounding makes many multipliers give the same network. `channels` must be monotone in m, so that these form an
    interval: bisection finds its ends, and the fraction of smallest denominator in it is the answer.
    """

    def first(beyond: Callable[[int, int], bool], every: bool) -> float:
        """The border below which not every (or not any) layer is beyond what was observed."""
        low, high = 0.0, _MAX_MULTIPLIER
        for _ in range(64):
            middle = (low + high) / 2
            verdicts = [beyond(mine, theirs) for mine, theirs in zip(channels(middle), observed, strict=True)]
            if all(verdicts) if every else any(verdicts):
                high = middle
            else:
                low = middle
        return high

    least = first(lambda mine, theirs: mine >= theirs, every=True)
    beyond = first(lambda mine, theirs: mine > theirs, every=False)
    for denominator in range(1, _MAX_DENOMINATOR + 1):
        multiplier = math.ceil(least * denominator) / denominator
        for candidate in (multiplier, multiplier + 1 / denominator):
            if 0 < candidate <= beyond and list(channels(candidate)) == list(observed):
                return candidate
    return None
