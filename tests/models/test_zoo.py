"""The zoo: sizes from the papers, names to networks and back, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from efrapq.errors import UnknownArchitectureError, UsageError
from efrapq.models import zoo
from efrapq.models.zoo import mobilenet_v2, resnet_cifar, vgg
from efrapq.models.zoo._layers import solve_multiplier

THIN = {"vgg16-bn-cifar": 0.125, "mobilenetv2-cifar": 0.25, "resnet18-cifar": 8, "smallresnet28": 4}


def state_of(name: str, **kwargs: float) -> dict[str, Tensor]:
    """A state_dict on the meta device: names and shapes are all that recognition reads."""
    with torch.device("meta"):
        return dict(zoo.get(name).build(**kwargs).state_dict())


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [
        # Table 6 of He et al. 2015 for the first five.
        ("resnet20", 0.27, 0.005),
        ("resnet32", 0.46, 0.005),
        ("resnet44", 0.66, 0.005),
        ("resnet56", 0.85, 0.005),
        ("resnet110", 1.7, 0.05),
        ("resnet18-cifar", 11.174, 0.0005),
        ("vgg16-bn-cifar", 14.728, 0.0005),
        ("mobilenetv2-cifar", 2.237, 0.0005),
        ("smallresnet28", 0.175, 0.0005),
    ],
)
def test_parameter_count(name: str, millions: float, tolerance: float) -> None:
    counted = sum(parameter.numel() for parameter in zoo.build(name).parameters())
    assert counted / 1e6 == pytest.approx(millions, abs=tolerance)


def test_names_lists_every_architecture_once() -> None:
    assert len(zoo.names()) == len(set(zoo.names())) == 9


@pytest.mark.parametrize("name", zoo.names())
def test_forward_gives_finite_logits_a_class_each(name: str) -> None:
    model = zoo.build(name, num_classes=7, width=THIN.get(name, 4), seed=0).eval()
    with torch.inference_mode():
        logits = model(torch.rand(1, *zoo.get(name).input_shape))
    assert logits.shape == (1, 7)
    assert logits.isfinite().all()


def test_option_a_shortcut_is_every_second_pixel_between_zero_channels() -> None:
    block = resnet_cifar.BasicBlock(4, 8, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    expected[:, 2:6] = x[:, :, ::2, ::2]
    with torch.inference_mode():
        assert torch.equal(block(x), expected)


def test_mobilenet_keeps_the_small_image_until_the_32_channel_blocks() -> None:
    sizes: list[int] = []
    model = zoo.build("mobilenetv2-cifar", width=0.25).eval()
    for stage in model.get_submodule("features").children():
        stage.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[-1]))
    with torch.inference_mode():
        model(torch.rand(1, 3, 32, 32))
    assert sizes == [32] * 4 + [16] * 3 + [8] * 7 + [4] * 5


def test_seed_fixes_the_weights_and_leaves_the_global_state() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (zoo.build("smallresnet28", width=4, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["stem.weight"], other["stem.weight"])


def test_without_a_seed_the_global_state_decides() -> None:
    first, second = (zoo.build("smallresnet28", width=4).state_dict()["stem.weight"] for _ in range(2))
    assert not torch.equal(first, second)


def test_build_of_an_unknown_name_lists_the_known_ones() -> None:
    for look_up in (zoo.build, zoo.get):
        with pytest.raises(UnknownArchitectureError, match=r"'resnet21'.*resnet20.*mobilenetv2-cifar"):
            look_up("resnet21")


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({"width": 0}, id="no width"),
        pytest.param({"width": 16.5}, id="fractional channels"),
        pytest.param({"width": float("nan")}, id="nan width"),
        pytest.param({"num_classes": -1}, id="negative classes"),
        pytest.param({"in_channels": 1 << 40}, id="giant input"),
    ],
)
def test_build_refuses_sizes_that_make_no_network(kwargs: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(kwargs))} of resnet20"):
        zoo.build("resnet20", **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", zoo.names())
@pytest.mark.parametrize(
    ("num_classes", "in_channels", "scale"),
    [(10, 3, 1), (43, 1, 0.5), (2, 4, 1.25)],
    ids=["cifar", "grey signs, half as wide", "two classes, wider"],
)
def test_recognizes_its_own_state_dict(name: str, num_classes: int, in_channels: int, scale: float) -> None:
    default = zoo.get(name).width
    width = type(default)(default * scale)
    state = state_of(name, num_classes=num_classes, in_channels=in_channels, width=width)
    match = zoo.recognize(state)
    assert match.architecture.name == name
    assert match.kwargs == {"num_classes": num_classes, "in_channels": in_channels, "width": width}
    assert match.input_shape == (in_channels, *match.architecture.input_shape[1:])
    assert shapes(match.state_dict) == shapes(state)


def test_all_architectures_together_are_recognized_in_an_instant() -> None:
    states = [state_of(name) for name in zoo.names()]
    started = time.perf_counter()
    for state in states:
        zoo.recognize(state)
    assert time.perf_counter() - started < 1.0  # 0.2 s on an idle machine


def test_an_odd_width_is_a_network_too() -> None:
    model = zoo.build("resnet20", width=5, seed=0).eval()
    assert zoo.recognize(model.state_dict()).kwargs["width"] == 5
    with torch.inference_mode():
        assert model(torch.rand(1, 3, 32, 32)).shape == (1, 10)


@settings(max_examples=50, deadline=None)
@given(width=st.floats(0.02, 8, exclude_min=True))
@pytest.mark.parametrize("channels", [vgg.vgg16_channels, mobilenet_v2.mobilenet_v2_channels], ids=["vgg", "mobilenet"])
def test_any_width_multiplier_is_found_up_to_rounding(channels, width: float) -> None:  # type: ignore[no-untyped-def]
    found = solve_multiplier(channels, channels(width))
    assert found is not None
    assert channels(found) == channels(width)


def test_width_multiplier_is_the_simplest_that_fits() -> None:
    assert solve_multiplier(vgg.vgg16_channels, vgg.vgg16_channels(1 / 3)) == 1 / 3
    assert solve_multiplier(mobilenet_v2.mobilenet_v2_channels, mobilenet_v2.mobilenet_v2_channels(1.4)) == 7 / 5
    assert solve_multiplier(vgg.vgg16_channels, [64, 64, *vgg.vgg16_channels(2.0)[2:]]) is None


@pytest.mark.parametrize("counters", ["present", "absent", "on a layer without BatchNorm"])
def test_batch_counters_do_not_matter(counters: str) -> None:
    state = zoo.build("resnet20", width=4, seed=0).state_dict()
    kept = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    if counters == "present":
        kept = dict(state)
    elif counters == "on a layer without BatchNorm":
        kept["linear.num_batches_tracked"] = torch.tensor(3)
    match = zoo.recognize(kept)
    assert match.architecture.name == "resnet20"
    assert not any(key.endswith("num_batches_tracked") for key in match.state_dict)
    zoo.load(match)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrapped_networks(prefix: str) -> None:
    state = {prefix + key: tensor for key, tensor in state_of("smallresnet28").items()}
    assert shapes(zoo.recognize(state).state_dict) == shapes(state_of("smallresnet28"))


def test_resnet18_by_its_other_usual_names() -> None:
    state = zoo.build("resnet18-cifar", width=4, num_classes=3, seed=0).state_dict()
    other = {key.replace("fc.", "linear.").replace("downsample", "shortcut"): value for key, value in state.items()}
    assert "layer2.0.shortcut.0.weight" in other
    match = zoo.recognize(other)
    assert match.architecture.name == "resnet18-cifar"
    assert shapes(match.state_dict) == shapes(state)
    assert torch.equal(match.state_dict["fc.weight"], state["fc.weight"])


def test_a_tensor_under_both_names_is_refused_not_dropped() -> None:
    state = state_of("resnet18-cifar", width=4)
    state["linear.weight"] = state["fc.weight"]
    with pytest.raises(UnknownArchitectureError, match=r"not part of it: 'linear\.weight'"):
        zoo.recognize(state)


def test_load_gives_the_same_network_in_evaluation_mode() -> None:
    model = zoo.build("vgg16-bn-cifar", width=0.125, seed=0).eval()
    loaded = zoo.load(zoo.recognize(model.state_dict()))
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
    assert not any(module.training for module in loaded.modules())


def test_load_shares_no_memory_with_what_it_was_given() -> None:
    state = zoo.build("smallresnet28", width=4, seed=0).state_dict()
    loaded = zoo.load(zoo.recognize(state))
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.fill_(0)
    assert state["stem.weight"].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_load_takes_any_float_type_and_gives_float32(dtype: torch.dtype) -> None:
    state = zoo.build("smallresnet28", width=4, seed=0).to(dtype).state_dict()
    loaded = zoo.load(zoo.recognize(state))
    assert {tensor.dtype for tensor in loaded.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert torch.equal(loaded.state_dict()["head.weight"], state["head.weight"].float())


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    """A thin ResNet-20 with some tensors replaced, added or (None) removed; `__` stands for a dot."""
    state = state_of("resnet20", width=4)
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param({}, r"holds no tensors", id="empty"),
        pytest.param({"bn.num_batches_tracked": torch.tensor(0)}, r"holds no tensors", id="only a counter"),
        pytest.param(
            changed(layer3__2__bn2__bias=None),
            r"closest is resnet20: 1 tensor missing: 'layer3\.2\.bn2\.bias'\.",
            id="a tensor missing",
        ),
        pytest.param(
            changed(layer2__0__shortcut__0__weight=torch.zeros(8, 4, 1, 1)),
            r"closest is resnet20: 1 tensor not part of it: 'layer2\.0\.shortcut\.0\.weight'\.",
            id="option B",
        ),
        pytest.param(
            changed(layer1__1__conv2__weight=torch.zeros(4, 4, 5, 5)),
            r"1 tensor of another shape: 'layer1\.1\.conv2\.weight' is 4×4×5×5, not 4×4×3×3",
            id="another kernel",
        ),
        pytest.param(
            changed(linear__weight=torch.zeros(10, 4)), r"'linear\.weight' is 10×4, not 10×16", id="another head"
        ),
        pytest.param(
            changed(conv1__weight=torch.zeros(4)), r"'conv1\.weight' is 4, not 16×3×3×3", id="a stem of one dimension"
        ),
        pytest.param(
            changed(conv1__weight=torch.zeros(4, 3, 3, 3, dtype=torch.int8)),
            r"1 tensor of another type: 'conv1\.weight' is int8",
            id="integers",
        ),
        pytest.param(
            changed(**{"evil\x1b[31m": torch.zeros(1)}), r"'evil\\x1b\[31m'", id="a name that drives the terminal"
        ),
        pytest.param(changed(**{"x" * 5000: torch.zeros(1)}), r": 'x{118}…\.", id="an endless name"),
        pytest.param(
            dict(resnet_cifar.ResNetCifar(26, width=4).state_dict()),
            r"closest is resnet20: 30 tensors not part of it: .*, …\.",
            id="a depth between",
        ),
        pytest.param(
            {"encoder.weight": torch.zeros(3, 3), "encoder.bias": torch.zeros(3)},
            r"tensors missing",
            id="something else",
        ),
        pytest.param(
            dict(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()), r"tensors missing", id="tiny"
        ),
    ],
)
def test_near_misses_are_refused_and_told_what_to_do(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UnknownArchitectureError, match=message) as caught:
        zoo.recognize(state)
    assert str(caught.value).endswith(
        "Name the network with --arch package.module:factory, or export the model to ONNX."
    )
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("stray", [{"epoch": 3}, {"model": {}}, {7: torch.zeros(1)}], ids=["number", "dict", "key"])
def test_what_is_no_named_tensor_is_refused_by_name(stray: dict[str, Tensor]) -> None:
    with pytest.raises(UnknownArchitectureError, match=rf"holds {next(iter(stray))!r}, a .*only named tensors belong"):
        zoo.recognize({**changed(), **stray})


@pytest.mark.parametrize("classes", [1 << 19, 1 << 40])
def test_giant_shapes_cost_neither_memory_nor_time(classes: int) -> None:
    state = changed(
        conv1__weight=torch.empty(1 << 20, 3, 3, 3, device="meta"),
        linear__weight=torch.empty(classes, 16, device="meta"),
    )
    started = time.perf_counter()
    with pytest.raises(UnknownArchitectureError, match=r"of another shape"):
        zoo.recognize(state)
    assert time.perf_counter() - started < 1.0


def test_imagenet_mobilenet_is_not_taken_for_the_one_with_other_strides() -> None:
    state = state_of("mobilenetv2-cifar", num_classes=1000, width=1.0)
    with pytest.raises(UnknownArchitectureError, match=r"1000 classes.*strides.*--arch mobilenetv2-cifar"):
        zoo.recognize(state)
    assert zoo.recognize(state, name="mobilenetv2-cifar").kwargs["num_classes"] == 1000


def test_recognize_by_name_tries_that_one_only() -> None:
    with pytest.raises(UnknownArchitectureError, match=r"not those of resnet32: 60 tensors missing"):
        zoo.recognize(state_of("resnet20"), name="resnet32")
    with pytest.raises(UnknownArchitectureError, match=r"no architecture 'resnet'"):
        zoo.recognize(state_of("resnet20"), name="resnet")
