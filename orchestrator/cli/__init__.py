"""The command line: one file a subject, options in one place. The one door to typer."""
