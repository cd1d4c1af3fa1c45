"""The mask engine: from embeddings and prompts to masks, exact and fast. May load torch."""
