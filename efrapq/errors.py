"""Every failure that a user can cause, as one tree.

    EfrapqError                      exit code 2 on the command line
    ├── UsageError                   options that contradict each other or make no sense
    ├── InputError                   a file that cannot be used
    │   ├── CorruptFileError         truncated, bad checksum, not what its header says
    │   ├── UnsafeFileError          loading it could run code or read other files
    │   ├── LimitError               larger, deeper or slower than the limits allow
    │   ├── UnsupportedFileError     a file type that efrapq does not read
    │   ├── UnsupportedModelError    a sound model that efrapq cannot quantize
    │   │   ├── AlreadyQuantizedError
    │   │   └── UnknownArchitectureError
    │   ├── BadWeightsError          NaN, infinity, or values that no grid can hold
    │   └── DataError                calibration or test data
    ├── OutputError                  the result cannot be written where it was asked
    └── RuntimeSetupError            a package is missing, conflicting or broken

Each message names the file, layer or option at fault and says what to do about it. Errors of other
libraries are turned into these once, where the library is called.
"""

from __future__ import annotations

__all__ = [
    "AlreadyQuantizedError",
    "BadWeightsError",
    "CorruptFileError",
    "DataError",
    "EfrapqError",
    "InputError",
    "LimitError",
    "OutputError",
    "RuntimeSetupError",
    "UnknownArchitectureError",
    "UnsafeFileError",
    "UnsupportedFileError",
    "UnsupportedModelError",
    "UsageError",
]


class EfrapqError(Exception):
    """Base of every error that efrapq raises on purpose."""


class UsageError(EfrapqError):
    """Options that contradict each other or make no sense."""


class InputError(EfrapqError):
    """A file that cannot be used."""


class CorruptFileError(InputError):
    """Truncated, bad checksum, or not what its header says."""


class UnsafeFileError(InputError):
    """Loading it could run code or read other files."""


class LimitError(InputError):
    """Larger, deeper or slower than the limits allow."""


class UnsupportedFileError(InputError):
    """A file type that efrapq does not read."""


class UnsupportedModelError(InputError):
    """A sound model that efrapq cannot quantize."""


class AlreadyQuantizedError(UnsupportedModelError):
    """The model holds quantized weights already."""


class UnknownArchitectureError(UnsupportedModelError):
    """A state_dict whose network is not in the zoo and was not named."""


class BadWeightsError(InputError):
    """NaN, infinity, or values that no grid can hold."""


class DataError(InputError):
    """Calibration or test data that cannot be used."""


class OutputError(EfrapqError):
    """The result cannot be written where it was asked."""


class RuntimeSetupError(EfrapqError):
    """A package is missing, conflicting or broken."""
