"""From chunks to outcomes: Celery's tasks, one process for each device. Only this folder imports Celery."""
