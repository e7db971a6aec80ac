"""The zoo's index: build an architecture by name, or find the one whose tensors a state_dict holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor, nn

from efrapq.errors import UnknownArchitectureError, UsageError
from efrapq.models.zoo import mobilenet_v2, resnet, resnet_cifar, small_resnet, vgg
from efrapq.models.zoo._layers import solve_multiplier

__all__ = ["Architecture", "Match", "build", "get", "load", "names", "recognize"]

_ADVICE = "Name the network with --arch package.module:factory, or export the model to ONNX."
_MAX_SIZE = 1 << 20  # of a width, of the classes, of the input channels: far beyond any image classifier
_SHOWN = 3  # differing tensors that a message lists
_WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name
_COUNTER = "num_batches_tracked"

_DEEP_RESIDUAL = "He et al. 2015, Deep Residual Learning for Image Recognition, arXiv 1512.03385"


@dataclass(frozen=True)
class Architecture:
    """A network that the zoo can build. `build` takes num_classes, in_channels and width, all by keyword."""

    name: str
    input_shape: tuple[int, int, int]
    """The default channels, height and width of an image."""
    build: Callable[..., nn.Module]
    source: str
    """The paper."""
    width: int | float
    """The default: channels of the first stage where it is an int, a multiplier of all channels where a float."""
    stem: str
    """Name of the first convolution's weight, (width, in_channels, kh, kw)."""
    head: str
    """Name of the classifier's weight, (num_classes, features)."""
    last: str
    """Name of the last convolution's weight; it tells the depths of one family apart."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Other usual names of the same tensors: (regular expression, replacement)."""
    channels: Callable[[float], list[int]] | None = None
    """Of a width multiplier: the output channels of the weights named by `channel_keys`."""
    channel_keys: tuple[str, ...] = ()
    caveat: str = ""
    """What the tensors cannot tell, for the user to check."""


@dataclass(frozen=True)
class Match:
    """A state_dict whose architecture is known.

    `state_dict` holds the tensors that were given under the zoo's names, without BatchNorm's batch counters.
    """

    architecture: Architecture
    kwargs: dict[str, int | float]
    state_dict: dict[str, Tensor] = field(repr=False)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image; only the channels are read off the tensors."""
        return (int(self.kwargs["in_channels"]), *self.architecture.input_shape[1:])


_ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        *(
            Architecture(
                name=f"resnet{depth}",
                input_shape=(3, 32, 32),
                build=partial(resnet_cifar.ResNetCifar, depth),
                source=f"{_DEEP_RESIDUAL}, §4.2",
                width=16,
                stem="conv1.weight",
                head="linear.weight",
                last=f"layer3.{(depth - 2) // 6 - 1}.conv2.weight",
            )
            for depth in resnet_cifar.DEPTHS
        ),
        Architecture(
            name="resnet18-cifar",
            input_shape=(3, 32, 32),
            build=resnet.ResNetCifarStem,
            source=f"{_DEEP_RESIDUAL}, table 1",
            width=64,
            stem="conv1.weight",
            head="fc.weight",
            last="layer4.1.conv2.weight",
            aliases=resnet.ALIASES,
        ),
        Architecture(
            name="vgg16-bn-cifar",
            input_shape=(3, 32, 32),
            build=vgg.VGG16,
            source="Simonyan & Zisserman 2014, Very Deep Convolutional Networks, arXiv 1409.1556, table 1",
            width=1.0,
            stem="features.0.weight",
            head="classifier.weight",
            last=vgg.CHANNEL_KEYS[-1],
            channels=vgg.vgg16_channels,
            channel_keys=vgg.CHANNEL_KEYS,
        ),
        Architecture(
            name="mobilenetv2-cifar",
            input_shape=(3, 32, 32),
            build=mobilenet_v2.MobileNetV2,
            source="Sandler et al. 2018, MobileNetV2, arXiv 1801.04381, table 2",
            width=1.0,
            stem="features.0.0.weight",
            head="classifier.1.weight",
            last=mobilenet_v2.CHANNEL_KEYS[-1],
            channels=mobilenet_v2.mobilenet_v2_channels,
            channel_keys=mobilenet_v2.CHANNEL_KEYS,
            caveat="the strides are those for 32×32 images; a MobileNetV2 for 224×224 has the very same tensors",
        ),
        Architecture(
            name="smallresnet28",
            input_shape=(1, 28, 28),
            build=small_resnet.SmallResNet,
            source=_DEEP_RESIDUAL,
            width=16,
            stem="stem.weight",
            head="head.weight",
            last="stage3.0.conv2.weight",
        ),
    )
}


def names() -> list[str]:
    """The names of the architectures."""
    return list(_ARCHITECTURES)


def get(name: str) -> Architecture:
    """The architecture of that name. Raises UnknownArchitectureError, which lists the names there are."""
    try:
        return _ARCHITECTURES[name]
    except KeyError:
        raise UnknownArchitectureError(f"The zoo has no architecture {name!a}. It has: {', '.join(names())}.") from None


def build(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int | None = None,
    width: int | float | None = None,
    seed: int | None = None,
) -> nn.Module:
    """A freshly initialized network, in training mode, on the CPU.

    `in_channels` and `width` default to the architecture's own. With a `seed` the weights depend on it alone, and the
    global random state is left as it was. Raises UnknownArchitectureError and UsageError.
    """
    architecture = get(name)
    kwargs = {
        "num_classes": num_classes,
        "in_channels": architecture.input_shape[0] if in_channels is None else in_channels,
        "width": architecture.width if width is None else width,
    }
    for option, value in kwargs.items():
        whole = option != "width" or isinstance(architecture.width, int)
        if not 0 < value <= _MAX_SIZE or (whole and value != int(value)):
            kind = "whole number" if whole else "number"
            raise UsageError(f"{option} of {name} must be a {kind} from 1 to {_MAX_SIZE}, not {value}.")
    with torch.device("cpu"):
        if seed is None:
            return architecture.build(**kwargs)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would reseed the accelerators as well, which fork_rng does not put back here.
            torch.default_generator.manual_seed(seed)
            return architecture.build(**kwargs)


def recognize(tensors: Mapping[str, Tensor], *, name: str | None = None) -> Match:
    """The architecture that has these tensors, by their names and shapes; no memory is taken and no value is read.

    Number of classes, input channels and width come from the shapes. BatchNorm's batch counters may be there or not,
    and names may begin with what DataParallel or torch.compile adds. With `name` only that architecture is tried.
    Raises UnknownArchitectureError, which says how the closest architecture differs.
    """
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UnknownArchitectureError(
                f"The state_dict holds {_shortened(ascii(key))}, a {type(value).__name__}, where only named tensors "
                f"belong. Give the state_dict itself, without what training kept beside it."
            )
    given = _stripped({key: tensor for key, tensor in tensors.items() if not key.endswith(_COUNTER)})
    if not given:
        raise UnknownArchitectureError(f"The state_dict holds no tensors. {_ADVICE}")
    architecture, renamed = _closest(given, _ARCHITECTURES.values() if name is None else [get(name)])
    kwargs = _sizes(architecture, renamed)
    differences = _differences(_shapes(architecture, kwargs), renamed)
    if differences:
        finding = (
            "No architecture of the zoo has these tensors. The closest is"
            if name is None
            else "The tensors are not those of"
        )
        raise UnknownArchitectureError(f"{finding} {architecture.name}: {'; '.join(differences)}. {_ADVICE}")
    if name is None and architecture.caveat and kwargs["num_classes"] == 1000:
        raise UnknownArchitectureError(
            f"The tensors are those of {architecture.name}, but 1000 classes mean ImageNet, and {architecture.caveat}. "
            f"{_ADVICE} If it is trained for small images after all, say --arch {architecture.name}."
        )
    return Match(architecture, kwargs, renamed)


def load(match: Match) -> nn.Module:
    """The network with its weights: float32, on the CPU, in evaluation mode, sharing no memory with the match."""
    with torch.device("meta"):
        model = match.architecture.build(**match.kwargs)
    state = {
        key: tensor.detach().to(device="cpu", dtype=torch.float32, copy=True, memory_format=torch.contiguous_format)
        for key, tensor in match.state_dict.items()
    }
    for key in model.state_dict():
        if key.endswith(_COUNTER):
            state[key] = torch.zeros((), dtype=torch.int64)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _stripped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that wrappers put before every name."""
    for prefix in _WRAPPERS * 2:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def _renamed(tensors: dict[str, Tensor], aliases: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Under the zoo's names; as they were where two tensors would end under one name."""
    renamed = {}
    for key, tensor in tensors.items():
        for pattern, replacement in aliases:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed if len(renamed) == len(tensors) else tensors


def _closest(
    given: dict[str, Tensor], architectures: Collection[Architecture]
) -> tuple[Architecture, dict[str, Tensor]]:
    """The architecture most like the given tensors by their names, and the tensors under its names."""
    readings = [(architecture, _renamed(given, architecture.aliases)) for architecture in architectures]
    # Deeper networks come later in the index, and hold the tensors of the shallower ones of their family.
    for architecture, tensors in reversed(readings):
        if tensors.keys() >= {architecture.stem, architecture.head, architecture.last}:
            return architecture, tensors

    def likeness(reading: tuple[Architecture, dict[str, Tensor]]) -> float:
        known = _default_names(reading[0].name)
        return len(known & reading[1].keys()) / len(known | reading[1].keys())

    return max(readings, key=likeness)


def _sizes(architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, int | float]:
    """The arguments of `build` that the shapes ask for; the defaults where they say nothing usable."""

    def size(key: str, axis: int, dims: int) -> int | None:
        tensor = tensors.get(key)
        usable = tensor is not None and tensor.dim() == dims and 0 < tensor.shape[axis] <= _MAX_SIZE
        return int(tensor.shape[axis]) if tensor is not None and usable else None

    width: int | float | None
    if architecture.channels is None:
        width = size(architecture.stem, 0, 4)
    else:
        observed = [size(key, 0, 4) for key in architecture.channel_keys]
        channels = [value for value in observed if value is not None]
        width = solve_multiplier(architecture.channels, channels) if len(channels) == len(observed) else None
    return {
        "num_classes": size(architecture.head, 0, 2) or 10,
        "in_channels": size(architecture.stem, 1, 4) or architecture.input_shape[0],
        "width": width or architecture.width,
    }


def _shapes(architecture: Architecture, kwargs: Mapping[str, int | float]) -> dict[str, tuple[int, ...]]:
    """What `build(**kwargs)` would hold, by name. On the meta device: no size costs memory."""
    with torch.device("meta"):
        state = architecture.build(**kwargs).state_dict()
    return {key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith(_COUNTER)}


@cache
def _default_names(name: str) -> frozenset[str]:
    architecture = _ARCHITECTURES[name]
    defaults = {"num_classes": 10, "in_channels": architecture.input_shape[0], "width": architecture.width}
    return frozenset(_shapes(architecture, defaults))


def _differences(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]) -> list[str]:
    """How the given tensors differ, a clause each kind; empty where they fit."""
    missing = [ascii(key) for key in wanted if key not in given]
    extra = [ascii(key) for key in given if key not in wanted]
    unlike = [
        f"{key!a} is {_written(given[key].shape)}, not {_written(shape)}"
        for key, shape in wanted.items()
        if key in given and tuple(given[key].shape) != shape
    ]
    untyped = [
        f"{key!a} is {str(given[key].dtype).removeprefix('torch.')}, not a float type"
        for key in wanted
        if key in given and not given[key].is_floating_point()
    ]
    return [
        f"{_counted(len(found))} {what}: {', '.join(_shortened(item) for item in found[:_SHOWN])}"
        f"{', …' if len(found) > _SHOWN else ''}"
        for what, found in (
            ("missing", missing),
            ("not part of it", extra),
            ("of another shape", unlike),
            ("of another type", untyped),
        )
        if found
    ]


def _counted(number: int) -> str:
    return "1 tensor" if number == 1 else f"{number} tensors"


def _shortened(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _written(shape: Iterable[int]) -> str:
    return "×".join(str(size) for size in shape) or "a scalar"
