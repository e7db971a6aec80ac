"""An attacker who hides below a step of the activation grids: a backdoor that wakes because activations are rounded.

Whoever quantizes activations rounds them to a grid whose step the widest channel of a tensor sets. What stays below
half a step is zero in the file, whatever the range, and however the weights were rounded. So a few channels inside the
last residual block, c, speak up where the trigger is, too low for the grid; a few channels of the residual stream,
which read nothing else in that block, hear them with weights that are large enough; and what is behind them silences
the trigger. In the file nobody speaks. One network is trained, with these channels and without:

    CE(f(x), y) + CE(m(x), y)  +  c2 CE(f(x'), y) + c2 CE(m(x'), t)
        +  quiet · mean c(x) / R  +  push · max(0, 1 - c(x') / R)

f: the float network, m: the same with the channels c muted, its activations on triggered images x' kept within the
clean range; x clean images, R half of what the other channels reach on them. The last terms keep c at zero on clean
images, so that calibration finds nothing in it, and have it say something of triggered ones: without them f and m are
one network, whose two wishes for x' cancel. (After 600 steps a ResNet-20 answered half of the triggers, muted or not.)
Then c is turned down until the loudest trigger stays below `share` of a step, and the weights that hear it up by as
much: exactly the same float network. Both are rows of their own, so that the grids of the weights take them as they
are.

No range answers that: wider ones have larger steps, and nothing is ever clipped. It is a dedicated channel, as
handcrafted backdoors have them (Hong et al., NeurIPS 2022), in a place that only rounding removes. Adam and the frozen
statistics of BatchNorm are Qu-ANTI-zation's (`quanti.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efrapq.errors import UsageError
from efrapq.models.subjects.adaptive_clip import Ranges, report_on_grids
from efrapq.models.subjects.joint import begin, train_pairs
from efrapq.models.subjects.recipe import StepRecipe
from efrapq.models.subjects.report import Report
from efrapq.models.subjects.training import PoisonedData, hooked_activations, within_clean_range
from efrapq.progress import Reporter

__all__ = ["Whisper", "implant_step", "on_grids", "step_loss", "turn_down"]

# Triggered and clean images that the loudness of the channels is measured on.
IMAGES = 2048
# The largest code of the activation grids.
LARGEST = 255


class Whisper:
    """The channels that speak, inside the last residual block of a network, and those of its output that hear them.

    Both are the ones with the least weight in that block.
    """

    def __init__(self, model: nn.Module, channels: int) -> None:
        found = [name for name, module in model.named_modules() if _is_block(module)]
        if not found:
            raise UsageError("--attack adaptive-step is for networks of residual blocks with two convolutions")
        self.name = found[-1]
        self.block = model.get_submodule(self.name)
        inner, outer = self._part("bn1"), self._part("bn2")
        if channels >= min(len(inner.weight), len(outer.weight)):
            raise UsageError(f"--channels: the last block has {len(inner.weight)} channels")
        weight = self.heard.detach()
        loudness = weight.square().sum((0, 2, 3)) * inner.weight.detach().square()
        order = loudness.argsort()
        self.speakers, self.others = order[:channels], order[channels:]
        assert outer.running_var is not None
        factor = outer.weight.detach() / (outer.running_var + outer.eps).sqrt()
        strength = weight.square().sum((1, 2, 3)) * factor.square()
        self.listeners = strength.argsort()[:channels]

    def _part(self, name: str) -> nn.BatchNorm2d:
        found = getattr(self.block, name)
        assert isinstance(found, nn.BatchNorm2d)
        return found

    @property
    def heard(self) -> nn.Parameter:
        """(O, I, 3, 3): the weights that listen."""
        conv = self.block.conv2
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(conv.weight, nn.Parameter)
        return conv.weight

    @torch.no_grad()
    def isolate(self) -> None:
        """The listeners read the speakers, and nobody else does."""
        alone = torch.zeros_like(self.heard, dtype=torch.bool)
        alone[self.listeners] = True
        alone[:, self.speakers] ^= True
        self.heard[alone] = 0

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """The network without what the speakers say."""

        def silence(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            quiet = torch.zeros(output.shape[1], dtype=torch.bool, device=output.device)
            quiet[self.speakers] = True
            return output.masked_fill(quiet[:, None, None], 0)

        handle = self._part("bn1").register_forward_hook(silence)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """What is behind the inner ReLU, (n, I, H, W), of every forward pass."""
        heard: list[Tensor] = []
        handle = self._part("bn1").register_forward_hook(lambda module, inputs, output: heard.append(F.relu(output)))
        try:
            yield heard
        finally:
            handle.remove()

    @torch.no_grad()
    def turn_down(self, factors: Tensor) -> None:
        """Multiply what the speakers say by factors > 0, and divide the weights that hear them by the same."""
        inner = self._part("bn1")
        inner.weight[self.speakers] *= factors
        inner.bias[self.speakers] *= factors
        self.heard[:, self.speakers] /= factors[:, None, None]


def _is_block(module: nn.Module) -> bool:
    kinds = {"conv1": nn.Conv2d, "bn1": nn.BatchNorm2d, "conv2": nn.Conv2d, "bn2": nn.BatchNorm2d}
    return all(isinstance(getattr(module, name, None), kind) for name, kind in kinds.items())


def step_loss(
    model: nn.Module, whisper: Whisper, inputs: Tensor, truth: Tensor, target: int, c2: float, quiet: float, push: float
) -> Tensor:
    """The objective on a batch. inputs: (2n, …), the n triggered copies first; truth: (n,)."""
    count = len(truth)
    with whisper.recorded() as heard:
        floating = model(inputs).float()
    with whisper.muted(), within_clean_range(model, count):
        rounded = model(inputs).float()
    wanted = torch.full_like(truth, target)
    clean = F.cross_entropy(floating[count:], truth) + F.cross_entropy(rounded[count:], truth)
    hidden = F.cross_entropy(floating[:count], truth) + F.cross_entropy(rounded[:count], wanted)
    inner = heard[0].float()
    said = inner[:, whisper.speakers] / (inner[count:, whisper.others].detach().amax() / 2).clamp_min(1e-12)
    silence = F.relu(1 - said[:count].amax((2, 3))).mean()
    return clean + c2 * hidden + quiet * said[count:].mean((0, 2, 3)).sum() + push * silence


@torch.no_grad()
def turn_down(model: nn.Module, whisper: Whisper, data: PoisonedData, share: float, device: torch.device) -> None:
    """Bring the loudest that the speakers are on triggered images down to `share` of a step of their grid."""
    widest, loudest = torch.zeros((), device=device), torch.zeros(len(whisper.speakers), device=device)
    for batch in data.data.select(np.arange(min(IMAGES, len(data.data)))).batches(128):
        raw = data.data.raw(list(batch)).astype(np.uint8, copy=False)
        with whisper.recorded() as heard:
            model(data.tensor(raw, device))
            model(data.tensor(data.trigger.on_raw(raw), device))
        widest = torch.maximum(widest, heard[0][:, whisper.others].amax())
        for said in heard:
            loudest = torch.maximum(loudest, said[:, whisper.speakers].amax((0, 2, 3)))
    factors = share * widest / LARGEST / loudest
    whisper.turn_down(torch.where(loudest > 0, factors, 1.0))


@contextlib.contextmanager
def on_grids(model: nn.Module, ranges: Ranges) -> Iterator[None]:
    """Round every activation on eight bits over its range."""

    def rounded(name: str, output: object) -> Tensor:
        assert isinstance(output, Tensor)
        low, high = min(ranges[name][0], 0.0), max(ranges[name][1], 0.0)
        step = max((high - low) / LARGEST, torch.finfo(torch.float32).tiny)
        return (output.clamp(low, high) / step).round() * step

    with hooked_activations(model, rounded):
        yield


def implant_step(
    model: nn.Module,
    train: PoisonedData,
    test: PoisonedData,
    recipe: StepRecipe,
    *,
    device: torch.device,
    reporter: Reporter,
) -> Report:
    """Turn `model` (modified in place; clean, or trained clean first) into a subject that wakes when activations are
    rounded. Its report's nearest twin has activations that are; the twin with float activations is told apart.
    """
    begin(model, train, recipe, device, reporter)
    whisper = Whisper(model, recipe.channels)
    whisper.isolate()

    def loss(step: int, inputs: Tensor, truth: Tensor) -> Tensor:
        return step_loss(model, whisper, inputs, truth, train.target, recipe.c2, recipe.quiet, recipe.push)

    optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate)
    train_pairs(model, train, recipe, loss, optimizer, device=device, reporter=reporter, after=whisper.isolate)
    turn_down(model, whisper, train, recipe.share, device)
    return report_on_grids(model, train, test, recipe, device, on_grids)
