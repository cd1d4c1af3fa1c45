"""An asset's bytes to upright RGB pixels. Only this package uses Pillow."""
