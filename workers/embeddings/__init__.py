"""Embeddings that are kept for clicks: their addresses, their bytes, the folder or bucket that holds them, the sweep.

Only `codec` loads torch.
"""
