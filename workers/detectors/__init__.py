"""Detectors: models that find boxes, which become prompts. A job's request to one, its files, and its loading."""
