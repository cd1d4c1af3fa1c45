"""Turns one asset into masks. Nothing here knows how many assets there are, or that people exist.

May import `db`; is imported by `orchestrator`. torch is loaded only by `workers.models.*` modules and
`workers.engine.automatic`, which are imported inside the worker's child process and nowhere else.
"""
