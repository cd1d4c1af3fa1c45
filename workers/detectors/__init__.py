"""Models whose boxes become prompts: what a job asks of one, its files, and how each kind is loaded."""
