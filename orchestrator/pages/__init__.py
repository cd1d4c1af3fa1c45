"""Pages to look at that need no server: the gallery, the review."""
