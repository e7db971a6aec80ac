"""docs/CLI.md is what --help says."""

from __future__ import annotations

from pathlib import Path

from efrapq.cli.reference import reference


def test_the_reference_is_up_to_date() -> None:
    written = Path(__file__).resolve().parents[2] / "docs" / "CLI.md"
    assert written.read_text("utf-8") == reference(), "run: python -m efrapq.cli.reference > docs/CLI.md"
