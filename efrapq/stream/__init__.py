"""The streaming pass: what turns a float graph and calibration inputs into codes and grids."""

from efrapq.stream.journal import Journal
from efrapq.stream.settings import LayerReport, PassSettings
from efrapq.stream.walk import Solved, streaming_pass

__all__ = ["Journal", "LayerReport", "PassSettings", "Solved", "streaming_pass"]
