"""Options of several commands: what they take, and what they refuse before any work."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from efrapq.cli.options import MemorySize


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("123", 123),
        ("1", 1),
        ("1k", 1024),
        ("1K", 1024),
        ("500M", 500 * 1024**2),
        ("2G", 2 * 1024**3),
        ("2g", 2 * 1024**3),
        ("3T", 3 * 1024**4),
        ("2GB", 2 * 1024**3),
        ("2GiB", 2 * 1024**3),
        ("64kib", 64 * 1024),
        ("100B", 100),
        ("007", 7),
    ],
)
def test_memory_size(text: str, size: int) -> None:
    assert MemorySize().convert(text, None, None) == size


BAD = ["0", "0G", "-1", "-2G", "1.5G", "G", "2X", "2 G", " 2G", "2G ", "2GG", "two", "1e9", "0x10", "inf", "9" * 5000]


@pytest.mark.parametrize("text", BAD, ids=lambda t: ascii(t[:10]))
def test_what_is_no_memory_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size such as 2G, 500M or a number of bytes"):
        MemorySize().convert(text, None, None)


@pytest.mark.parametrize("text", ["0", "1.5G", "two", "", "9" * 5000], ids=lambda t: ascii(t[:10]))
def test_bad_memory_sizes_end_the_command(run, tmp_path: Path, text: str) -> None:
    """The option is refused first: the model does not even exist."""
    ran = run("defend", tmp_path / "none.onnx", f"--memory={text}")
    assert ran.code == 2
    assert "--memory" in ran.err
    assert "such as 2G" in ran.err
    assert "Traceback" not in ran.err
