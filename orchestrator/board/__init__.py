"""The page for people who do not live in a terminal: jobs, how far they are, what they found. It only reads."""
