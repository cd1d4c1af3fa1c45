"""Many assets, and people: the command line, listing, dispatch, exports, galleries, Label Studio.

Imports `workers` and `db`; nothing imports it. Never loads torch.
"""
