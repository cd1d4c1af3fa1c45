"""The mask engine: embeddings and prompts to masks, exact and fast. May load torch."""
