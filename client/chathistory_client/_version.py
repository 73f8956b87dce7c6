"""The version of the client, copied by scripts/version.py: do not edit."""

__version__ = "0.1.0"
