"""The one place where the version is written; read by the build and by `mhconvert --version`."""

__version__ = "0.2.0"
