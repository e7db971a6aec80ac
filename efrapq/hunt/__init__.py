"""A trigger that nobody gave: `search_trigger()` looks for one, `defend_searched()` covers what it finds."""

from efrapq.hunt.covered import Searched, defend_searched
from efrapq.hunt.search import SEARCH_SCHEMA, Found, search_trigger

__all__ = ["SEARCH_SCHEMA", "Found", "Searched", "defend_searched", "search_trigger"]
