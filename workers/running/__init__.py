"""Chunks to outcomes: Celery's tasks, one process a device, what a process keeps. The one door to Celery."""
