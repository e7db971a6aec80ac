"""How much of a machine an untrusted file may use."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]

_MIB = 1 << 20
_GIB = 1 << 30


@dataclass(frozen=True)
class Limits:
    """Upper bounds that every reader in `efrapq.io` holds a file to; going over one raises LimitError.

    The defaults leave room for any vision model that a desktop machine can quantize.
    """

    max_file_bytes: int = 4 * _GIB
    """Size of a file that is read."""
    max_header_bytes: int = 16 * _MIB
    """Size of a safetensors header or of the pickle in a torch checkpoint (weights not counted)."""
    max_onnx_bytes: int = 2 * _GIB - 1
    """Size of an ONNX model with the external data that are read into it; protobuf itself cannot hold more."""
    max_inline_bytes: int = 256 * _MIB
    """Size of an ONNX model with its external data up to which all of them are read into it."""
    min_outside_bytes: int = 256 << 10
    """Size from which on an initializer of a larger model stays in its file, and is read when it is needed."""
    max_external_bytes: int = 64 * _GIB
    """Size of an ONNX model with all of its external data, and of one file of these."""
    max_tensor_elements: int = 1 << 31
    """Elements of one tensor."""
    max_total_bytes: int = 16 * _GIB
    """Bytes that all tensors of a file, or all members of a zip archive, take in memory."""
    max_zip_ratio: int = 16
    """Bytes unpacked for each byte of a zip archive."""
    max_zip_members: int = 100_000
    """Members of a zip archive."""
    max_expansion: int = 16
    """Bytes of tensors for each byte of stored data (a stride of 0 makes many out of one)."""
    max_nesting: int = 32
    """Depth of ONNX subgraphs, and of function calls."""
    max_nodes: int = 200_000
    """Nodes of an ONNX model, counted with every local function expanded."""
