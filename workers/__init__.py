"""Turns one asset into masks. Nothing here knows how many assets there are, or about the people who review masks.

May import `db`, and `orchestrator` imports it. Only `workers.engine`, `workers.models`, `workers.detectors` and
`workers.training` load torch. In a job that happens only inside the worker's child process.
"""

from workers.compiler import defer_compiler

defer_compiler()
