"""From reviewed masks to a tuned decoder: its plan, the process that trains, the verdict, the new model's files."""
