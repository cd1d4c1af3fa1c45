"""Prompt files and detectors to rows: where a job asks for masks."""
