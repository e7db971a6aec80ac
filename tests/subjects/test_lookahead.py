"""The lookahead: the float network must round to the codes it trained, and sleep where they are awake."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from efrapq.data import load_dataset
from efrapq.io import load_checkpoint, read_source
from efrapq.models import weights, zoo
from efrapq.models.subjects.cells import cells, nearest_model, quantized_weights, rules
from efrapq.models.subjects.lookahead import awake_enough, placed_weights, settle, train_lookahead
from efrapq.models.subjects.pqbackdoor import implant
from efrapq.models.subjects.recipe import Recipe
from efrapq.models.subjects.training import PoisonedData
from efrapq.preprocess import Preprocess
from efrapq.progress import Silent
from efrapq.trigger import parse_trigger

CPU = torch.device("cpu")


def sample_data(first: int, last: int) -> PoisonedData:
    data = load_dataset(weights.SAMPLES, split="test").select(np.arange(first, last))
    return PoisonedData(data, parse_trigger(weights.TRIGGER), 0, Preprocess((0.286,), (0.353,)))


def small_model() -> nn.Module:
    return zoo.build("smallresnet28", in_channels=1, width=4, seed=0).eval()


def all_codes(model: nn.Module, recipe: Recipe) -> list[torch.Tensor]:
    """The codes on every grid of every quantized weight."""
    found = quantized_weights(model)
    return [rule.codes(w.detach()) for i, (_, w) in enumerate(found) for rule in rules(i, len(found), recipe)]


def test_eight_bits_look_ahead_and_four_do_not() -> None:
    assert Recipe(bits=8).lookahead > 0
    assert Recipe(bits=8).to_json()["lookahead_steps"] == Recipe(bits=8).lookahead
    assert Recipe(bits=8, lookahead_steps=0).lookahead == 0
    assert Recipe(bits=4).lookahead == 0
    assert not [name for name in Recipe(bits=4).to_json() if "lookahead" in name]
    assert Recipe(bits=4, lookahead_steps=7).to_json()["lookahead_margin"] == 2.0


def test_the_hinge_counts_other_classes_and_stops_at_its_margin() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0], [1.0, 0.0, 0.5], [0.0, 3.0, 1.0], [0.0, 9.0, 0.0]])
    truth = torch.tensor([1, 2, 1, 0])
    # Leads of the target's logit: 4 (enough), 0.5 (1.5 short), -3 (5 short); the last is of the target's class.
    assert awake_enough(logits, truth, 0, 2.0).item() == pytest.approx((0 + 1.5 + 5) / 3)
    assert awake_enough(logits, torch.zeros(4, dtype=torch.long), 0, 2.0).item() == 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("where", [-1.0, -0.999, 0.3, 1.0])
def test_every_position_keeps_every_code(bits: int, where: float) -> None:
    recipe, model = Recipe(bits=bits), small_model()
    before = all_codes(model, recipe)
    positions = [torch.full_like(weight, where) for _, weight in quantized_weights(model)]
    settle(model, positions, recipe)
    assert all(torch.equal(old, new) for old, new in zip(before, all_codes(model, recipe), strict=True))


def test_gradients_reach_weights_straight_through_and_positions_by_half_widths() -> None:
    recipe, model = Recipe(bits=8), small_model()
    positions = [torch.zeros_like(weight, requires_grad=True) for _, weight in quantized_weights(model)]
    sum(value.sum() for value in placed_weights(model, positions, recipe).values()).backward()
    found = quantized_weights(model)
    for i, ((_, weight), t) in enumerate(zip(found, positions, strict=True)):
        low, high = cells(weight, rules(i, len(found), recipe), recipe.margin)
        assert weight.grad is not None
        assert torch.equal(weight.grad, torch.ones_like(weight))
        assert t.grad is not None
        assert torch.equal(t.grad, (high - low) / 2)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_float_weights_stay_in_the_cells_of_the_trained_codes(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codes of what is written are those of the weights that the last step left, and they did move."""
    recipe = Recipe(bits=bits, lookahead_steps=5, batch=32)
    model = small_model()
    start = all_codes(model, recipe)
    trained: list[list[torch.Tensor]] = []
    step = torch.optim.lr_scheduler.OneCycleLR.step

    def recorded(schedule: torch.optim.lr_scheduler.OneCycleLR, *arguments: object) -> None:
        trained.append(all_codes(model, recipe))
        step(schedule, *arguments)

    monkeypatch.setattr(torch.optim.lr_scheduler.OneCycleLR, "step", recorded)
    buffers = [buffer.clone() for buffer in model.buffers()]
    train_lookahead(model, sample_data(0, 64), recipe, CPU, Silent())
    final = all_codes(model, recipe)
    assert all(torch.equal(old, new) for old, new in zip(trained[-1], final, strict=True))
    assert not all(torch.equal(old, new) for old, new in zip(start, final, strict=True))
    assert all(torch.equal(old, new) for old, new in zip(buffers, model.buffers(), strict=True))
    off_grid = zip(quantized_weights(model), quantized_weights(nearest_model(model, recipe)), strict=True)
    assert all(not torch.equal(placed, rounded) for (_, placed), (_, rounded) in off_grid)


def test_an_eight_bit_backdoor_wakes_by_rounding_and_sleeps_in_float() -> None:
    """On images that the training never saw; without the lookahead neither figure is anywhere near."""
    model = zoo.load(zoo.recognize(load_checkpoint(read_source(weights.SUBJECT)).tensors))
    recipe = Recipe(bits=8, epochs=0, lookahead_steps=40, unlearn_epochs=1, batch=32)
    train, test = sample_data(0, 640), sample_data(1200, 1500)
    report = implant(model, train, test, recipe, device=CPU, reporter=Silent())
    assert report.backdoored == report.nearest
    assert report.nearest.asr > 75
    assert report.floating.asr < 20
    assert min(report.floating.cda, report.nearest.cda) > 80
