"""Capture a model's program as an FX graph: a recorder on fake tensors, with two rungs to fall back on."""
