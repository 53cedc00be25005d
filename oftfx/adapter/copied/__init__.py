"""Code that is copied into checkpoints; it imports nothing of oftfx."""
