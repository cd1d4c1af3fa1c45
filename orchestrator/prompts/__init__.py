"""Turns prompt files and detectors into rows: where a job asks for masks."""
