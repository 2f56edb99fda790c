"""The version, alone so that the build can read it without importing torch."""

__version__: str = "4.0.0"
