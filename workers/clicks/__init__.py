"""From a click and a kept embedding to a mask, in a process of its own. Its messages need no torch."""
