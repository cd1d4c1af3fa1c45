"""An asset's bytes to upright RGB pixels. The one door to Pillow."""
