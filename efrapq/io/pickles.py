"""What a pickle would import, found without running it."""

from __future__ import annotations

import pickletools
import re
import warnings

from efrapq.errors import CorruptFileError
from efrapq.io.text import printable

__all__ = ["pickle_globals", "unsafe_globals"]

# All that a state_dict and what usually lies beside it need. torch's own list is longer, can be extended by any
# package in the process, and has bytearray on it, which fills the memory when called with a large number.
_SAFE = frozenset(
    {
        "collections.Counter",
        "collections.OrderedDict",
        "_codecs.encode",
        "builtins.complex",
        "builtins.set",
        "__builtin__.complex",
        "__builtin__.set",
        "torch.Size",
        "torch.Tensor",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._utils._rebuild_nested_tensor",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_qtensor",
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
    }
)
_SAFE_PATTERN = re.compile(
    r"torch\.((cuda\.)?[A-Z][A-Za-z0-9]*Storage"  # storages by type
    r"|storage\.(Untyped|Typed)Storage"
    r"|(b?float|u?int|q?u?int|complex|bits)[0-9][a-z0-9_]*|bool"  # dtypes
    r"|per_(tensor|channel)_(affine|symmetric|affine_float_qparams))"  # quantization schemes
)


def pickle_globals(data: bytes, name: str) -> list[str]:
    """Return the dotted names of all that the pickle `data` imports, sorted.

    Nothing is imported or run. Raises CorruptFileError if `data` is not a complete pickle.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools decodes backslashes, and Python warns of unknown ones
            return sorted(_globals(data))
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise CorruptFileError(f"{name}: damaged pickle ({printable(error)}); copy or download it again") from None


def _globals(data: bytes) -> set[str]:
    found: set[str] = set()
    # STACK_GLOBAL takes its two names from the stack, where they came as strings or from the memo.
    strings: list[str] = []
    memo: dict[int, str] = {}
    last = ""
    for opcode, arg, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            found.add(str(arg).replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":
            found.add(".".join(strings[-2:]) or "?")
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = last
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(arg or 0)] = last
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            last = memo.get(int(arg or 0), "")
            strings = [*strings[-1:], last]
        else:
            last = arg if isinstance(arg, str) else ""
            strings = [*strings[-1:], last] if last else strings
    return found


def unsafe_globals(data: bytes, name: str) -> list[str]:
    """Return what the pickle `data` imports and no state_dict needs, sorted; raises as `pickle_globals`."""
    return [g for g in pickle_globals(data, name) if g not in _SAFE and not _SAFE_PATTERN.fullmatch(g)]
