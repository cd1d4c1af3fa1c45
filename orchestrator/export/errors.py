"""What stops an export, with what a person can do."""

from __future__ import annotations


class ExportError(Exception):
    """An export that cannot be written, or not in this place. The message says why."""
