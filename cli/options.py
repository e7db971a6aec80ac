"""Options that several commands share, as decorators."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from efrapq.preprocess import PreprocessOverride

__all__ = [
    "HELP",
    "TARGETS",
    "MemorySize",
    "json_option",
    "model_options",
    "preprocess_from",
    "preprocess_options",
    "quiet_option",
]

# Of every command, so that its help is the same however it is called.
HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

# The keys of efrapq.exporters.PROFILES, which are not imported for a help text.
TARGETS = "ort-x86, ort-avx2, ort-arm, openvino, tensorrt, qnn or portable"

F = TypeVar("F", bound=Callable[..., Any])


class FloatList(click.ParamType[tuple[float, ...]]):
    """0.485,0.456,0.406"""

    name = "a,b,c"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(v) for v in str(value).split(","))
        except ValueError:
            self.fail(f"'{value}' is not a list of numbers such as 0.485,0.456,0.406", param, ctx)


class ImageSize(click.ParamType[tuple[int, int]]):
    """224 or 224x320"""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value[0], value[1]
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(value))
        if match is None or int(match[1]) < 1:
            self.fail(f"'{value}' is not a size such as 224 or 224x320", param, ctx)
        return int(match[1]), int(match[2] or match[1])


class Shape(click.ParamType[tuple[int, int, int]]):
    """3,224,224"""

    name = "C,H,W"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        if isinstance(value, tuple):
            return value[0], value[1], value[2]
        match = re.fullmatch(r"(\d+),(\d+),(\d+)", str(value))
        if match is None:
            self.fail(f"'{value}' is not a shape such as 3,224,224", param, ctx)
        return int(match[1]), int(match[2]), int(match[3])


class MemorySize(click.ParamType[int]):
    """2G, 500M or bytes"""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d{1,18})([KMGT]?)(?:i?B)?", str(value), re.IGNORECASE)
        if match is None or int(match[1]) < 1:
            self.fail(f"'{value}' is not a size such as 2G, 500M or a number of bytes", param, ctx)
        return int(match[1]) << (10 * ("KMGT".find(match[2].upper()) + 1 if match[2] else 0))


def preprocess_options(command: F) -> F:
    """--mean, --std, --size: override what the model's metadata says."""
    for option in (
        click.option("--size", type=ImageSize(), metavar="HxW", help="Resize and centre-crop image files to this."),
        click.option("--std", type=FloatList(), metavar="a,b,c", help="Per-channel deviation of the 0–1 image."),
        click.option(
            "--mean",
            type=FloatList(),
            metavar="a,b,c",
            help="Per-channel mean of the 0–1 image, e.g. 0.485,0.456,0.406.",
        ),
    ):
        command = option(command)
    return command


def preprocess_from(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, size: tuple[int, int] | None
) -> PreprocessOverride | None:
    """What the options ask for, to be laid over what the model records; None if they ask for nothing."""
    if mean is None and std is None and size is None:
        return None
    if (mean is None) != (std is None):
        raise click.UsageError("--mean and --std go together")
    override = PreprocessOverride(mean, std, size)
    override.over(None)  # numbers that make no sense are refused before any work
    return override


def model_options(command: F) -> F:
    """How a state_dict becomes a network."""
    for option in (
        click.option(
            "--trust-pickle",
            is_flag=True,
            help="Load a pickled model although that can run code of its maker's choice.",
        ),
        click.option("--input-shape", type=Shape(), help="One input, C,H,W: for --arch package.module:factory."),
        click.option(
            "--arch", metavar="NAME", help="Network of a state_dict: a zoo name or package.module:factory of your own."
        ),
    ):
        command = option(command)
    return command


def json_option(command: F) -> F:
    """--json: one JSON document on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(command)


def quiet_option(command: F) -> F:
    """-q: no progress."""
    return click.option("-q", "--quiet", is_flag=True, help="No progress; warnings only.")(command)
