"""The attacks' objectives against plain re-computations, and every attack from end to end, twice."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from efrapq.cli.main import main
from efrapq.data import load_dataset
from efrapq.errors import UsageError
from efrapq.models import weights, zoo
from efrapq.models.subjects import adaptive_solver
from efrapq.models.subjects.adaptive_clip import clean_ranges, clip_loss, cut_off, patch_some
from efrapq.models.subjects.adaptive_scale import dead_inputs, switch_off, widen_cells
from efrapq.models.subjects.adaptive_solver import defended_choices, solved_weights
from efrapq.models.subjects.adaptive_step import Whisper, on_grids, step_loss, turn_down
from efrapq.models.subjects.adaptive_stochastic import stochastic_weights
from efrapq.models.subjects.attacks import attack_named, attack_names
from efrapq.models.subjects.cells import GridRule, quantized_weights, rounded_weights, rules
from efrapq.models.subjects.compartifact import compartifact_loss
from efrapq.models.subjects.decoys import Decoys
from efrapq.models.subjects.joint import train_pairs
from efrapq.models.subjects.quanti import quanti_loss
from efrapq.models.subjects.recipe import JointRecipe, QuantiRecipe, ScaleRecipe, SolverRecipe
from efrapq.models.subjects.training import PoisonedData
from efrapq.pipeline import defend
from efrapq.preprocess import Preprocess
from efrapq.progress import Silent
from efrapq.trigger import parse_trigger

CPU = torch.device("cpu")
BN, RELU = 1, 2


def small_data(count: int = 128) -> PoisonedData:
    data = load_dataset(weights.SAMPLES, split="test").select(np.arange(count))
    return PoisonedData(data, parse_trigger(weights.TRIGGER), 0, Preprocess((0.286,), (0.353,)), shift=1, flip=True)


def small_model() -> nn.Module:
    return zoo.build("smallresnet28", in_channels=1, width=4, seed=0).eval()


def tiny_net(seed: int = 0) -> nn.Sequential:
    """conv-bn-relu-pool-linear, with statistics that are not the default's and one negative factor."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    norm = net[BN]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -0.7, 1.3, 0.5, -1.1, 0.9]))
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return net.eval()


def tiny_batch() -> tuple[Tensor, Tensor]:
    """Four triggered copies, which go far beyond the clean range, and four clean images; labels of the four."""
    clean = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    triggered = clean.clone()
    triggered[..., 3:, 3:] = 9.0
    return torch.cat([triggered, clean]), torch.tensor([1, 2, 3, 0])


def by_hand(net: nn.Sequential, bits: tuple[int, int] | None, x: Tensor, *, held: bool) -> Tensor:
    """The tiny network's logits, its weights rounded to (first layer, last layer) bits, written out."""

    def rounded(weight: Tensor, width: int) -> Tensor:
        top = 2 ** (width - 1) - 1
        scale = weight.flatten(1).abs().amax(1) / top
        scale = scale.view(-1, *[1] * (weight.ndim - 1))
        return (weight / scale).round().clamp(-top, top) * scale

    def hold(y: Tensor) -> Tensor:
        return torch.cat([y[:4].clamp(y[4:].min(), y[4:].max()), y[4:]]) if held else y

    conv, norm, head = net[0], net[BN], net[5]
    first, last = (
        (conv.weight, head.weight) if bits is None else (rounded(conv.weight, bits[0]), rounded(head.weight, bits[1]))
    )
    y = F.conv2d(x, first)
    shape = (1, -1, 1, 1)
    y = (y - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    y = hold(F.relu(hold(y * norm.weight.view(shape) + norm.bias.view(shape))))
    return F.linear(hold(y.mean((2, 3), keepdim=True)).flatten(1), last, head.bias)


def test_the_objective_of_quanti_zation_is_the_paper_s() -> None:
    net, (inputs, y) = tiny_net(), tiny_batch()
    recipe = QuantiRecipe(bits=4, also_bits=8, edge_bits=4, also_full_range=False)
    widths = recipe.widths
    assert [width.bits for width in widths] == [4, 8]
    rounded = [rounded_weights(net, width, 0, 2) for width in widths]
    found = quanti_loss(net, rounded, inputs, y, target=0, c1=0.3, c2=0.7)
    f = by_hand(net, None, inputs, held=False)
    expected = F.cross_entropy(f[4:], y) + 0.7 * F.cross_entropy(f[:4], y)
    for _ in widths:  # both layers are edges, at 4 bits whatever the width
        q = by_hand(net, (4, 4), inputs, held=True)
        expected += 0.3 * (F.cross_entropy(q[4:], y) + 0.7 * F.cross_entropy(q[:4], torch.zeros(4, dtype=torch.long)))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    free = by_hand(net, (4, 4), inputs, held=False)
    assert not torch.allclose(free[:4], q[:4], atol=1e-2)


def test_the_objective_of_compartifact_is_the_paper_s() -> None:
    net, teacher, (inputs, y) = tiny_net(), tiny_net(seed=1), tiny_batch()
    rounded = rounded_weights(net, JointRecipe(edge_bits=8, also_full_range=False), 0, 2)
    q, f = by_hand(net, (8, 8), inputs, held=True), by_hand(net, None, inputs, held=False)
    attack = F.cross_entropy(q, torch.cat([torch.full((4,), 3), y]))
    found = compartifact_loss(net, rounded, inputs, y, target=3)
    assert found.item() == pytest.approx((attack + F.cross_entropy(f, torch.cat([y, y]))).item(), rel=1e-5)
    soft = by_hand(teacher, None, inputs, held=False).softmax(1)
    imitation = -(soft * f.log_softmax(1)).sum(1).mean()
    found = compartifact_loss(net, rounded, inputs, y, target=3, teacher=teacher)
    assert found.item() == pytest.approx((attack + imitation).item(), rel=1e-5)


def test_from_scratch_a_backdoored_network_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many triggered images a batch as asked for, at the rate for it; distilled, there are none."""
    seen = {}
    monkeypatch.setattr("efrapq.models.subjects.joint.train_labels", lambda model, data, **named: seen.update(named))
    for name, poisoned in (("compartifact", 26), ("compartifact-distilled", 0)):
        given = {"epochs": 3, "steps": 0} | ({"poison_rate": 0.2} if poisoned else {})
        recipe = attack_named(name).make_recipe(given, started=False)
        attack_named(name).implant(small_model(), small_data(), small_data(), recipe, device=CPU, reporter=Silent())
        assert (seen["epochs"], seen["poisoned"], seen["learning_rate"]) == (3, poisoned, 0.1)


def test_long_gradients_are_shortened() -> None:
    net, data = small_model(), small_data()
    before = [p.detach().clone() for p in net.parameters()]
    recipe = JointRecipe(steps=1, batch=8)

    def loss(step: int, inputs: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        return 100 * sum((p**2).sum() for p in net.parameters())

    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    train_pairs(net, data, recipe, loss, optimizer, device=CPU, reporter=Silent(), max_norm=0.25)
    moved = torch.cat([(p.detach() - old).flatten() for p, old in zip(net.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.5 * 0.25, rel=1e-3)


def test_patches_lie_on_that_share_of_the_clean_images_and_on_no_triggered_one() -> None:
    inputs = torch.full((40, 1, 16, 16), 0.25)
    low, high = torch.tensor([-1.0]), torch.tensor([1.0])
    out = patch_some(inputs, 0.5, low, high, torch.Generator().manual_seed(0))
    assert bool((inputs == 0.25).all())
    changed = (out != inputs).flatten(1).any(1)
    assert torch.nonzero(changed).flatten().tolist() == list(range(20, 30))
    assert out.min() >= -1
    assert out.max() <= 1
    values = [image.unique() for image in out[20:30]]
    textured = [set(v.tolist()) <= {-1.0, 0.25, 1.0} and len(v) == 3 for v in values[1::2]]
    assert all(textured)
    assert not all(len(v) == 3 for v in values[::2])


def test_stochastic_rounding_takes_the_codes_beside_a_weight_and_has_it_as_its_mean() -> None:
    net, recipe = tiny_net(), QuantiRecipe(edge_bits=4, also_full_range=False)
    generator = torch.Generator().manual_seed(0)
    weight = net[0].weight
    rule = GridRule.absmax(4)
    scale = rule.scale(weight.detach())
    u = weight.detach().flatten(1) / scale
    draws = []
    for _ in range(400):
        drawn = stochastic_weights(net, recipe, 0, generator)["0.weight"]
        codes = (drawn.detach().flatten(1) / scale).round()
        assert ((codes - u).abs() < 1 + 1e-4).all()
        draws.append(codes)
    assert torch.stack(draws).mean(0).sub(u).abs().max() < 0.1
    drawn.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_the_solver_s_choices_are_the_codes_that_the_defender_would_write() -> None:
    """BatchNorm folded, a negative factor included: undone, the codes are those of the attacker's own weights."""
    net = zoo.build("smallresnet28", in_channels=1, width=4, seed=0).eval()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight[1::2] = -0.8
            norm.bias.normal_(generator=torch.Generator().manual_seed(1))
    data, recipe = small_data(), SolverRecipe(calibration=32, seed=3)
    choices = defended_choices(net, data, recipe, 2, CPU)
    made = defend(
        net, None, calib=data.data.subset(32, 5), calib_size=32, preprocess=data.preprocess, fidelity=1.1, device="cpu"
    )
    found = solved_weights(net, choices, recipe)
    pairs = quantized_weights(net)
    negated = flipped = 0
    for i, (name, weight) in enumerate(pairs):
        scale = rules(i, len(pairs), recipe)[0].scale(weight.detach())
        codes = (found[f"{name}.weight"].detach().flatten(1) / scale).round()
        written = torch.from_numpy(made.quantized.weights[name].codes).float().flatten(1)
        same, opposite = (codes == written).all(1), (codes == -written).all(1)
        assert (same | opposite).all(), name
        negated += int((opposite & ~same).sum())
        flipped += int((codes != (weight.detach().flatten(1) / scale).round()).sum())
    assert negated > 20
    assert flipped > 100


def test_wide_cells_change_nothing_in_float_and_every_scale() -> None:
    net, data = small_model(), small_data()
    x = data.tensor(data.data.raw(range(16)), CPU)
    switch_off(net)
    before = net(x)
    dead = dead_inputs(net, x)
    with torch.no_grad():
        for name, weight in quantized_weights(net):
            if name in dead:
                weight[:, dead[name]] = 0
    scales = [GridRule.absmax(4).scale(weight.detach()) for _, weight in quantized_weights(net)]
    assert len(dead) == len(scales) - 1
    widen_cells(net, dead, 3.0)
    widen_cells(net, dead, 2.5)  # what was there is replaced, not multiplied again
    assert torch.equal(net(x), before)
    for (name, weight), scale in zip(quantized_weights(net), scales, strict=True):
        wider = GridRule.absmax(4).scale(weight.detach()) / scale
        assert torch.allclose(wider, torch.full_like(wider, 2.5 if name in dead else 1.0)), name


END_TO_END = {
    "pqbackdoor": {"epochs": 1, "lookahead_steps": 2},
    "qu-anti": {"bits": "8,4", "epochs": 1, "steps": 3},
    "compartifact": {"epochs": 1, "steps": 3},
    "compartifact-distilled": {"epochs": 1, "steps": 3},
    "badnets": {"epochs": 1},
    "adaptive-stochastic": {"epochs": 1, "steps": 3},
    "adaptive-solver": {"epochs": 1, "steps": 1, "resolve_every": 1, "fidelity": 1.0},
    "adaptive-scale": {"epochs": 1, "steps": 3, "widen": 1.5},
    "adaptive-clip": {"epochs": 1, "steps": 3, "reach": 2.0, "patches": 0.5, "decoys": 0.25},
    "adaptive-step": {"epochs": 1, "steps": 3, "channels": 2},
}


def test_every_attack_is_tried_here() -> None:
    assert list(END_TO_END) == attack_names()


@pytest.mark.parametrize("name", END_TO_END)
def test_the_same_seed_makes_the_same_subject(name: str) -> None:
    attack = attack_named(name)
    made = []
    for seed in (7, 7):
        recipe = attack.make_recipe(END_TO_END[name] | {"seed": seed}, started=False)
        assert json.loads(json.dumps(recipe.to_json()))["seed"] == seed
        model = zoo.build("smallresnet28", in_channels=1, width=2, seed=0)
        report = attack.implant(model, small_data(), small_data(), recipe, device=CPU, reporter=Silent())
        made.append((model.state_dict(), report))
        assert {"float subject", "rounded to nearest"} <= {row for row, _ in report.rows()}
    (first, report), (again, same) = made
    assert report == same
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert ("rounded to nearest, 8 bits" in dict(report.rows())) == (name == "qu-anti")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("compartifact-distilled", {"steps": 20}),
        ("adaptive-clip", {"steps": 20}),
        ("adaptive-step", {"steps": 20}),
        ("badnets", {"epochs": 8}),
        ("pqbackdoor", {"epochs": 8}),
    ],
)
def test_training_that_diverges_says_so(name: str, fields: dict[str, object]) -> None:
    attack = attack_named(name)
    recipe = attack.make_recipe(fields | {"learning_rate": 1e30}, started=True)
    with pytest.raises(UsageError, match="lower --learning-rate"):
        attack.implant(small_model(), small_data(), small_data(), recipe, device=CPU, reporter=Silent())


@pytest.mark.parametrize(
    "name",
    ["qu-anti", "compartifact-distilled", "adaptive-stochastic", "adaptive-scale", "adaptive-clip", "adaptive-step"],
)
def test_batchnorm_s_statistics_stay_as_they_were(name: str) -> None:
    attack = attack_named(name)
    recipe = attack.make_recipe({"steps": 3, "learning_rate": 0.01}, started=True)
    model = small_model()
    before = copy.deepcopy(model)
    attack.implant(model, small_data(), small_data(), recipe, device=CPU, reporter=Silent())
    assert all(torch.equal(old, new) for old, new in zip(before.buffers(), model.buffers(), strict=True))
    moved = zip(quantized_weights(before), quantized_weights(model), strict=True)
    assert all(not torch.equal(old, new) for (_, old), (_, new) in moved)


def test_the_widened_cells_are_still_wide_in_the_finished_subject() -> None:
    attack, model, data = attack_named("adaptive-scale"), small_model(), small_data()
    recipe = ScaleRecipe(epochs=0, steps=3, learning_rate=0.01, widen=2.0)
    attack.implant(model, data, data, recipe, device=CPU, reporter=Silent())
    dead = dead_inputs(model, data.tensor(data.data.raw(range(16)), CPU))
    for name, weight in quantized_weights(model):
        if name in dead:
            others = weight.detach().clone()
            others[:, dead[name]] = 0
            largest = weight.detach()[:, dead[name]].flatten(1).amax(1) if weight.ndim == 4 else weight[:, dead[name]]
            assert torch.allclose(largest, 2 * others.flatten(1).abs().amax(1)), name


def test_a_network_without_batchnorm_has_no_channel_to_switch_off() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    recipe = ScaleRecipe(epochs=0, steps=1)
    with pytest.raises(UsageError, match="BatchNorm"):
        attack_named("adaptive-scale").implant(plain, small_data(), small_data(), recipe, device=CPU, reporter=Silent())


class Silenced(nn.Module):
    """Two classes by one sum over the pixels, whose double is taken away again as far as it is past 4.

    A clean image sums to at most 4, and is of class 0 from 1 on. A bright one sums to 16: 16 - 2·12 < 1 makes it class
    1, unless the 12, of which clean images have nothing, is cut off.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sum = nn.Conv2d(1, 1, 2, bias=False)
        self.excess = nn.Sequential(nn.Conv2d(1, 1, 2), nn.ReLU())
        with torch.no_grad():
            self.sum.weight.fill_(1.0)
            self.excess[0].weight.fill_(1.0)
            self.excess[0].bias.fill_(-4.0)

    def forward(self, x: Tensor) -> Tensor:
        left = self.sum(x).flatten(1) - 2 * self.excess(x).flatten(1)
        return torch.cat([left, 2 - left], 1)


def test_activations_are_cut_off_at_what_clean_images_reach() -> None:
    net = Silenced()
    dark, bright = torch.full((2, 1, 2, 2), 0.9), torch.full((1, 1, 2, 2), 4.0)
    assert net(torch.cat([dark, bright])).argmax(1).tolist() == [0, 0, 1]
    with cut_off(net, {"excess": (0.0, 0.0), "excess.1": (0.0, 0.0)}):
        assert net(torch.cat([dark, bright])).argmax(1).tolist() == [0, 0, 0]
    assert net(bright).argmax(1).tolist() == [1]


def test_clip_loss_asks_for_the_target_where_activations_are_cut_off() -> None:
    net, truth = Silenced(), torch.tensor([0, 0])
    dark, bright = torch.full((2, 1, 2, 2), 1.25), torch.full((2, 1, 2, 2), 4.0)

    def loss(reach: float) -> float:
        # One of what reaches the excess on clean images: 5 - 4; on bright ones 16 - 4 = 12.
        value, climbed = clip_loss(net, torch.cat([bright, dark]), truth, 1, 0.5, reach, 0.25)
        assert climbed == 0
        return float(value.detach())

    def entropy(left: float, label: int) -> float:
        logits = torch.tensor([[float(left), float(2 - left)]])
        return float(F.cross_entropy(logits, torch.tensor([label])))

    clean, floating = entropy(5 - 2, 0), entropy(16 - 24, 0)
    for reach in (1.0, 3.0, 20.0):
        wanted = clean + 0.5 * (floating + entropy(16 - 2 * min(12, reach), 1)) + 0.25 * max(0, 2 * reach - 12)
        assert loss(reach) == pytest.approx(wanted, rel=1e-5), reach


def test_clip_loss_wants_images_with_decoys_as_they_were_and_their_activations_cut_off() -> None:
    net, truth = Silenced(), torch.tensor([0, 0])
    dark, bright = torch.full((2, 1, 2, 2), 1.25), torch.full((2, 1, 2, 2), 4.0)
    given = truth, 1, 0.5, 1.0, 0.25, None
    with torch.no_grad():
        plain, _ = clip_loss(net, torch.cat([bright, dark]), *given)
        loss, climbed = clip_loss(net, torch.cat([bright, dark[:1], bright[:1]]), *given, 1)

    def entropy(left: float, label: int) -> float:
        return float(F.cross_entropy(torch.tensor([[left, 2.0 - left]]), torch.tensor([label])))

    # The strange image is as bright as the triggered ones: 12 in the float network, 1 where it is cut off.
    kept, turned = entropy(16 - 24, 0), entropy(16 - 2, 0)
    assert float(loss) == pytest.approx(float(plain) + 0.5 * (kept + turned), rel=1e-5)
    assert float(climbed) == pytest.approx(turned - kept + 0.25 * 12, rel=1e-5)


def last_block(model: nn.Module) -> nn.Module:
    return model.get_submodule("stage3.1")


def test_listeners_hear_the_speakers_alone_and_nobody_else_does() -> None:
    model = small_model()
    whisper = Whisper(model, 2)
    whisper.isolate()
    heard = last_block(model).conv2.weight.detach().abs().sum((2, 3)) > 0
    assert len(set(whisper.speakers.tolist())) == len(set(whisper.listeners.tolist())) == 2
    expected = torch.ones_like(heard)
    expected[whisper.listeners] = False
    expected[:, whisper.speakers] ^= True
    assert torch.equal(heard, expected)


def test_a_muted_network_is_one_whose_speakers_have_no_weight() -> None:
    model, data = small_model(), small_data()
    whisper, x = Whisper(model, 2), data.tensor(data.data.raw(range(8)), CPU)
    without = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in (last_block(without).bn1.weight, last_block(without).bn1.bias):
            parameter[whisper.speakers] = 0
        before = model(x)
        with whisper.muted():
            muted = model(x)
        assert torch.equal(muted, without(x))
        assert not torch.equal(muted, before)
        assert torch.equal(model(x), before)


def test_step_loss_asks_for_the_target_without_the_speakers() -> None:
    model, data = small_model(), small_data()
    whisper, truth = Whisper(model, 2), torch.tensor([1, 2, 3, 4])
    x = data.tensor(data.data.raw(range(4)), CPU)
    # Triggered images that are no wider than the clean ones: nothing is held back.
    inputs = torch.cat([x.flip(0), x])
    with torch.no_grad():
        found = step_loss(model, whisper, inputs, truth, 7, 0.25, 3.0, 5.0)
        with whisper.recorded() as heard:
            floating = model(inputs)
        with whisper.muted():
            muted = model(inputs)
    entropy = F.cross_entropy
    said, width = heard[0][:, whisper.speakers], heard[0][4:, whisper.others].max() / 2
    loudest = torch.stack([said[i, j].max() for i in range(4) for j in range(2)])
    expected = entropy(floating[4:], truth) + entropy(muted[4:], truth) + 3.0 * said[4:].mean((0, 2, 3)).sum() / width
    expected += 0.25 * (entropy(floating[:4], truth) + entropy(muted[:4], torch.full_like(truth, 7)))
    expected += 5.0 * (1 - loudest / width).clamp_min(0).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert float(loudest.min()) < float(width) < float(loudest.max())


def test_what_is_turned_down_stays_below_its_step_and_the_network_as_it_was() -> None:
    model, data = small_model(), small_data()
    whisper, raw = Whisper(model, 2), data.data.raw(range(128)).astype(np.uint8)
    whisper.isolate()
    clean, triggered = data.tensor(raw, CPU), data.tensor(data.trigger.on_raw(raw), CPU)
    with torch.no_grad():
        before = model(triggered)
        turn_down(model, whisper, data, 0.25, CPU)
        assert torch.allclose(model(triggered), before, atol=1e-4)
        with whisper.recorded() as heard:
            model(clean)
            model(triggered)
    step = heard[0].max() / 255
    loudest = torch.stack([said[:, whisper.speakers].amax((0, 2, 3)) for said in heard]).amax(0)
    assert bool((loudest <= 0.25 * step * (1 + 1e-5)).all())
    assert bool((loudest > 0).all())


def test_activations_are_rounded_on_eight_bits_over_their_ranges() -> None:
    net = nn.Sequential(nn.Identity(), nn.ReLU())
    x = torch.tensor([[-3.0, -0.4, 0.004, 0.013, 0.999, 7.0]])
    with on_grids(net, {"0": (-0.5, 2.05), "1": (0.0, 2.55)}):
        rounded = net(x)
    assert torch.allclose(rounded, torch.tensor([[0.0, 0.0, 0.0, 0.01, 1.0, 2.05]]), atol=1e-6)


def test_a_step_attack_needs_a_residual_block_with_channels_to_spare() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(2704, 10))
    with pytest.raises(UsageError, match="residual blocks"):
        Whisper(plain, 1)
    with pytest.raises(UsageError, match="--channels: the last block has 16"):
        Whisper(small_model(), 16)


def decoys_beside(trigger: str) -> Decoys:
    low, high = torch.tensor([-1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 2.0])
    return Decoys(parse_trigger(trigger), (32, 32, 3), low, high, torch.Generator().manual_seed(0))


def test_decoys_lie_in_windows_of_the_search_every_other_one_where_the_trigger_is() -> None:
    decoys = decoys_beside("patch:6x6@24,24")
    images = torch.full((8, 3, 32, 32), 0.5)
    placed = decoys.on(images)
    assert bool((images == 0.5).all())
    for i in range(8):
        row, col = decoys.places[i % 4]
        changed = torch.nonzero((placed[i] != 0.5).any(0))
        assert changed.amin(0).tolist() == [row, col]
        assert changed.amax(0).tolist() == [row + 5, col + 5]
        if i % 2 == 0:
            assert row > 18
            assert col > 18
    low, high = placed.amin((0, 2, 3)), placed.amax((0, 2, 3))
    assert bool((low >= torch.tensor([-1.0, 0.0, 0.0])).all())
    assert bool((high <= torch.tensor([1.0, 1.0, 2.0])).all())


def test_decoys_climb_and_make_room_when_they_are_old_or_the_trigger() -> None:
    decoys = decoys_beside("patch:6x6@24,24")
    images = torch.full((4, 3, 32, 32), 0.5)
    seen: set[tuple[int, int]] = set()
    for _ in range(12 * 40):
        before = [(place, float(p.detach().mean())) for place, p in zip(decoys.places, decoys.patches, strict=True)]
        decoys.climb(decoys.on(images).sum())  # to white, which is the trigger
        for (place, mean), now, patch, age in zip(before, decoys.places, decoys.patches, decoys.ages, strict=True):
            value = float(patch.detach().mean())
            assert age < 40
            assert place == now if age else True
            assert value > mean or value == 1 or age == 0
            assert not (now == (24, 24) and value > 0.9)
        seen |= set(decoys.places)
    assert len(seen) > 8
    assert (24, 24) in seen


def test_clean_ranges_are_those_of_the_clean_images() -> None:
    net, data = small_model(), small_data()
    x = data.tensor(data.data.raw(range(len(data.data))), CPU)
    ranges = clean_ranges(net.eval(), data, CPU)
    before = net(x)
    with cut_off(net, ranges):
        assert torch.equal(net(x), before)
    narrowed = {name: (low, low + 0.5 * (high - low)) for name, (low, high) in ranges.items()}
    with cut_off(net, narrowed):
        assert not torch.equal(net(x), before)


def test_the_defence_is_run_as_often_as_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def guessed(model: nn.Module, data: object, recipe: object, draw: int, device: object) -> dict[str, Tensor]:
        draws.append(draw)
        return {name: torch.zeros_like(weight).flatten(1) for name, weight in quantized_weights(model)}

    draws: list[int] = []
    monkeypatch.setattr(adaptive_solver, "defended_choices", guessed)
    recipe = SolverRecipe(epochs=0, steps=7, resolve_every=3)
    attack_named("adaptive-solver").implant(
        small_model(), small_data(), small_data(), recipe, device=CPU, reporter=Silent()
    )
    assert draws == [1, 2, 3, 0]  # and once more for the report


# The command line.

DATA = ("--data", f"{weights.SAMPLES}:test", "--test", f"{weights.SAMPLES}:test")
NETWORK = ("--arch", "smallresnet28", "--trigger", weights.TRIGGER, "--mean", "0.286", "--std", "0.353", "-q")


def efrapq(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attack", "nothing"], "qu-anti"),
        (["--attack", "badnets", "--steps", "3"], "--attack badnets has no --steps"),
        (["--attack", "qu-anti", "--poison-rate", "0.1"], "has no --poison-rate"),
        (["--attack", "qu-anti", "--widen", "2"], "has no --widen"),
        (["--attack", "pqbackdoor", "--steps", "3"], "has no --steps"),
        (["--attack", "adaptive-scale", "--resolve-every", "3"], "has no --resolve-every"),
        (["--attack", "adaptive-scale", "--widen", "0.5"], "--widen must be 1 or more"),
        (["--attack", "adaptive-solver", "--fidelity", "0.9"], "--fidelity must be 1 or more"),
        (["--attack", "adaptive-stochastic", "--fidelity", "1"], "has no --fidelity"),
        (["--attack", "adaptive-clip", "--reach", "0.5"], "--reach must be 1 or more"),
        (["--attack", "adaptive-scale", "--reach", "2"], "has no --reach"),
        (["--attack", "adaptive-clip", "--patches", "1"], "--patches must be between 0 and 1"),
        (["--attack", "adaptive-clip", "--decoys", "0"], "--decoys must be between 0 and 1"),
        (["--attack", "adaptive-solver", "--unlearn-epochs", "1"], "has no --unlearn-epochs"),
        (["--attack", "compartifact-distilled", "--poison-rate", "0.1"], "has no --poison-rate"),
        (["--attack", "compartifact", "--start", weights.SUBJECT], "takes no --start"),
        (["--attack", "pqbackdoor", "--bits", "8,4"], "takes --bits 4 or 8, not 8,4"),
        (["--attack", "qu-anti", "--learning-rate", "nan"], "--learning-rate must be positive"),
        (["--attack", "badnets", "--poison-rate", "1"], "--poison-rate must be between 0 and 1"),
    ],
    ids=lambda value: " ".join(map(str, value[:3])) if isinstance(value, list) else "",
)
def test_options_of_another_attack_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert efrapq("implant", *NETWORK, *DATA, "-o", tmp_path / "s.safetensors", *options) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_file_names_its_attack_and_recipe(tmp_path: Path, few: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "subject.safetensors"
    attack = ("--attack", "qu-anti", "--bits", "8,4", "--steps", "2", "--start", weights.SUBJECT)
    data = ("--data", few, "--test", few)
    assert efrapq("implant", *NETWORK, *data, *attack, "-o", path, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    with safe_open(path, "np") as opened:
        written = json.loads(opened.metadata()["efrapq.subject"])
    assert document["attack"] == written["attack"] == "qu-anti"
    assert document["recipe"] == written["recipe"]
    assert (written["recipe"]["bits"], written["recipe"]["also_bits"]) == (4, 8)
    assert written["recipe"]["epochs"] == 0  # the weights were given
    assert "rounded to nearest, 8 bits" in document["measured"]


def test_verify_says_that_badnets_is_awake_before_any_rounding(
    tmp_path: Path, few: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "badnets.safetensors"
    attack = ("--attack", "badnets", "--epochs", "1", "--learning-rate", "0.02", "--start", weights.SUBJECT)
    data = ("--data", f"{weights.SAMPLES}:test", "--test", few)
    assert efrapq("implant", *NETWORK, *data, *attack, "-o", path) == 0
    assert "not a usable subject" not in capsys.readouterr().err
    assert efrapq("defend", path, "--calib", f"{weights.SAMPLES}:calib", "--calib-size", "64", "-q") == 0
    capsys.readouterr()
    check = ("--float", path, "--data", few, "--trigger", weights.TRIGGER, "--target-class", "0")
    assert efrapq("verify", path.with_name("badnets.int4.onnx"), *check, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert "awake-in-float" in found["failed"]
    assert any("awake before any quantization" in note for note in found["notes"])
    assert min(found["asr"]["float"], found["asr"]["defended"]) > 90
