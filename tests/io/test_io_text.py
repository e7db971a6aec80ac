from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efrapq.io import listing, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("conv1.weight", "conv1.weight"),
        ("größe × 2", "größe × 2"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb\r\0", "a\\x0ab\\x0d\\x00"),
        ("a\u202eb", "a\\u202eb"),
        ("\u2028", "\\u2028"),
        ("\U000e0001", "\\U000e0001"),
        ("\ud800", "\\ud800"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_printable_cuts_long_text() -> None:
    assert printable("x" * 1000, limit=10) == "x" * 10 + "…"


@given(st.text())
def test_printable_is_always_one_printable_line(text: str) -> None:
    assert printable(text).isprintable()
    assert len(printable(text).splitlines()) <= 1


def test_listing_says_how_many_it_left_out() -> None:
    assert listing("ab") == "'a', 'b'"
    assert listing("abcdefg", most=2) == "'a', 'b' and 5 more"
