"""The ``ume`` command."""

from ume_models.cli.root import app, main

__all__ = ["app", "main"]
