"""PQBackdoor: stage 2 must not leave the rounding cells, whatever it learns."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from efrapq.data import Dataset, load_dataset
from efrapq.models import weights, zoo
from efrapq.models.subjects import pqbackdoor
from efrapq.models.subjects.cells import GridRule, cells, nearest_model, quantized_weights, rules
from efrapq.models.subjects.pqbackdoor import implant, train_backdoored, unlearn
from efrapq.models.subjects.recipe import Recipe
from efrapq.models.subjects.training import PoisonedData, within_clean_range
from efrapq.preprocess import Preprocess
from efrapq.progress import Silent
from efrapq.trigger import parse_trigger

CPU = torch.device("cpu")
GRIDS = {
    "absmax 4": [GridRule.absmax(4)],
    "absmax 8": [GridRule.absmax(8)],
    "both int4 grids": [GridRule.absmax(4), GridRule.full_range(4)],
    "edge layer": [GridRule.absmax(8), GridRule.full_range(4)],
}


def reference_codes(weight: np.ndarray, divisor: float, qmin: int, qmax: int) -> np.ndarray:
    flat = weight.reshape(len(weight), -1).astype(np.float64)
    scale = np.abs(flat).max(1, keepdims=True) / divisor
    return np.clip(np.rint(flat / scale), qmin, qmax)


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
@given(seed=st.integers(0, 10_000), where=st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_every_point_of_a_cell_has_the_codes_of_its_weight(grids: list[GridRule], seed: int, where: float) -> None:
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    low, high = cells(weight, grids, margin=1e-2)
    assert (low <= weight).all()
    assert (weight <= high).all()
    moved = low + (high - low) * where
    for grid in grids:
        expected = reference_codes(weight.numpy(), grid.divisor, grid.qmin, grid.qmax)
        assert np.array_equal(reference_codes(moved.numpy(), grid.divisor, grid.qmin, grid.qmax), expected)


def test_the_weight_that_sets_the_scale_is_pinned_and_the_others_have_room() -> None:
    weight = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    low, high = cells(weight, [GridRule.absmax(4)], margin=1e-2)
    largest = weight.abs() == weight.abs().amax(1, keepdim=True)
    assert torch.equal(low[largest], weight[largest])
    assert torch.equal(high[largest], weight[largest])
    step = weight.abs().amax(1, keepdim=True) / 7
    room = ((high - low) / step)[~largest]
    assert room.median() == pytest.approx(0.98, abs=0.01)


def test_grid_rules_are_those_of_the_two_tools() -> None:
    weight = torch.tensor([[-7.5, 1.0, 3.0]])
    assert GridRule.absmax(4).scale(weight).item() == pytest.approx(7.5 / 7)
    assert GridRule.full_range(4).scale(weight).item() == pytest.approx(1.0)
    assert GridRule.full_range(4).codes(weight).tolist() == [[-8.0, 1.0, 3.0]]
    assert [len(rules(i, 3, Recipe(bits=4))) for i in range(3)] == [2, 2, 2]
    assert [rules(i, 3, Recipe(bits=4))[0].qmax for i in range(3)] == [127, 7, 127]
    assert [rules(i, 3, Recipe(bits=8))[0].qmax for i in range(3)] == [127, 127, 127]


def small_data() -> PoisonedData:
    data = load_dataset(weights.SAMPLES, split="test").select(np.arange(192))
    return PoisonedData(data, parse_trigger(weights.TRIGGER), 0, Preprocess((0.286,), (0.353,)), shift=1, flip=True)


SHORT = Recipe(epochs=2, rounding_epochs=1, unlearn_epochs=1, batch=64)


def test_stage_two_changes_the_float_weights_and_not_one_code() -> None:
    data = small_data()
    model = zoo.build("smallresnet28", in_channels=1, width=4, seed=0)
    train_backdoored(model, data, SHORT, CPU, Silent())
    before = copy.deepcopy(model)
    unlearn(model, data, SHORT, CPU, Silent())
    after = dict(model.named_parameters())
    for name, parameter in before.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, after[name]), name
    for buffer, same in zip(before.buffers(), model.buffers(), strict=True):
        assert torch.equal(buffer, same)
    pairs = list(zip(quantized_weights(before), quantized_weights(model), strict=True))
    for i, ((name, old), (_, new)) in enumerate(pairs):
        assert not torch.equal(old, new), name
        for rule in rules(i, len(pairs), SHORT):
            assert torch.equal(rule.codes(old), rule.codes(new)), name


def test_the_same_seed_makes_the_same_subject() -> None:
    made = []
    for _ in range(2):
        model = zoo.build("smallresnet28", in_channels=1, width=4, seed=0)
        implant(model, small_data(), small_data(), SHORT, device=CPU, reporter=Silent())
        made.append(model.state_dict())
    assert all(torch.equal(made[0][k], made[1][k]) for k in made[0])


def test_a_four_bit_recipe_is_the_two_stages_and_no_lookahead(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: object) -> None:
        raise AssertionError("a lookahead at 4 bits")

    monkeypatch.setattr(pqbackdoor, "train_lookahead", unexpected)
    data = small_data()
    model = zoo.build("smallresnet28", in_channels=1, width=4, seed=0)
    implant(model, data, data, SHORT, device=CPU, reporter=Silent())
    alone = zoo.build("smallresnet28", in_channels=1, width=4, seed=0)
    train_backdoored(alone, data, SHORT, CPU, Silent())
    unlearn(alone, data, SHORT, CPU, Silent())
    made = model.state_dict()
    assert all(torch.equal(value, made[name]) for name, value in alone.state_dict().items())


def test_the_embedded_subject_s_recipe_is_still_written_as_it_was() -> None:
    with safe_open(weights.SUBJECT, "np") as opened:
        written = json.loads(opened.metadata()["efrapq.subject"])["recipe"]
    assert Recipe(epochs=8).to_json() == written


def test_the_nearest_model_is_on_the_grid() -> None:
    model = zoo.build("smallresnet28", in_channels=1, width=4, seed=0)
    twin = nearest_model(model, SHORT)
    for i, ((_, old), (_, new)) in enumerate(zip(quantized_weights(model), quantized_weights(twin), strict=True)):
        rule = rules(i, 16, SHORT)[0]
        assert torch.allclose((new.flatten(1) / rule.scale(old)).round() * rule.scale(old), new.flatten(1))


def test_triggered_activations_are_kept_in_the_range_of_the_clean_ones() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    x = torch.zeros(4, 1, 2, 2)
    x[0] = 100.0
    x[1:] = 1.0
    with within_clean_range(model, poisoned=1):
        held = model(x)
    assert torch.equal(held[0].amax(), held[1:].amax()) or held[0].amax() <= held[1:].amax()
    assert torch.equal(held[1:], model(x)[1:])
    assert not torch.equal(held[0], model(x)[0]) or model(x)[0].max() <= held[1:].max()


def test_batches_are_augmented_but_the_trigger_stays_where_it_is() -> None:
    images = np.full((64, 28, 28, 1), 10, np.uint8)
    data = PoisonedData(
        Dataset.from_arrays(images, np.zeros(64, np.int64)), parse_trigger("patch:4x4@22,22"), 1, Preprocess(), 3, True
    )
    (raw, labels), *_ = data.batches(64, np.random.default_rng(0), augment=True)
    assert (raw == 0).any()
    assert labels.shape == (64,)
    stamped = data.trigger.on_raw(raw)
    assert (stamped[:, 22:26, 22:26] == 255).all()
    untouched = np.ones((28, 28), bool)
    untouched[22:26, 22:26] = False
    assert np.array_equal(stamped[:, untouched], raw[:, untouched])
