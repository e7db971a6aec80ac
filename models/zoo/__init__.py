"""Architectures by name, and the search for the one that a bare state_dict belongs to."""

from __future__ import annotations

from efrapq.models.zoo.registry import Architecture, Match, build, get, load, names, recognize

__all__ = ["Architecture", "Match", "build", "get", "load", "names", "recognize"]
