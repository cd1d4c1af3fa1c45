"""Jobs: requested, listed, dispatched, reported."""
