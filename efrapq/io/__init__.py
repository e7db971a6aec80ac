"""Models from outside, read with distrust, and results written whole.

`read_source` reads a file once and tells what it is; `load_checkpoint` and `load_onnx` make weights or a model of it.
"""

from efrapq.io.atomic import check_output, write_all, write_atomic
from efrapq.io.checkpoint import Checkpoint, load_checkpoint
from efrapq.io.external import FileTensor, data_as_inputs
from efrapq.io.limits import Limits
from efrapq.io.onnx_file import OnnxFile, is_quantized, load_onnx, refuse_quantized
from efrapq.io.sniff import Format, sniff
from efrapq.io.source import Source, read_source
from efrapq.io.tensors import require_finite
from efrapq.io.text import listing, printable

__all__ = [
    "Checkpoint",
    "FileTensor",
    "Format",
    "Limits",
    "OnnxFile",
    "Source",
    "check_output",
    "data_as_inputs",
    "is_quantized",
    "listing",
    "load_checkpoint",
    "load_onnx",
    "printable",
    "read_source",
    "refuse_quantized",
    "require_finite",
    "sniff",
    "write_all",
    "write_atomic",
]
