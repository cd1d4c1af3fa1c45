"""Masks as shapes: runs, polygons, outlines, colours. Pure functions."""
