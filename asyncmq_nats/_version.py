"""The version of this library: for the package, and for the entries of its workers."""

__all__ = ["__version__"]

__version__ = "0.1.0"
