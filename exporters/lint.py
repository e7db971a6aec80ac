"""Checking a QDQ file against the rules of a target: the only check of a runtime that is not at hand."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from efrapq.exporters.rules import Graph
from efrapq.exporters.targets import profile
from efrapq.io.text import printable

__all__ = ["Violation", "lint"]


@dataclass(frozen=True)
class Violation:
    """rule: the sentence that is broken. source: where the target's makers say so. node: where. detail: how."""

    rule: str
    source: str
    node: str
    detail: str

    def __str__(self) -> str:
        return f"{printable(self.node)}: {printable(self.detail)}. {self.rule} ({self.source})"


def lint(proto: onnx.ModelProto, target: str) -> list[Violation]:
    """Every place in the file that breaks a rule of the target; an empty list if it may be written."""
    rules, graph = profile(target).rules, Graph(proto)
    return [Violation(r.words, r.source, node, detail) for r in rules for node, detail in r.check(graph)]
