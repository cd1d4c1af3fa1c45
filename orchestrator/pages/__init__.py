"""HTML pages that need no server: the gallery and the review."""
