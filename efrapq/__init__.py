"""efrapq: quantize models from suppliers that one cannot trust."""
