"""Files, paths, progress, memory: what every other part of the package may use."""

__version__ = "0.1.0"
