"""The version, for the metadata of rankings."""

__version__ = "0.1.0"
