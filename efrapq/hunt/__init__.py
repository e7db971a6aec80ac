"""A trigger that nobody gave: `search_trigger()` looks for one."""

from efrapq.hunt.search import SEARCH_SCHEMA, Found, search_trigger

__all__ = ["SEARCH_SCHEMA", "Found", "search_trigger"]
