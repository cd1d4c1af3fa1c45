"""Teaches SAM's mask decoder what reviewers corrected. It runs in a process of its own, which loads torch.

`lessons` turns masks into targets, `prompts` draws what a person would ask, `training` changes the decoder, `judging`
measures it before and after, `verdict` decides.
"""
