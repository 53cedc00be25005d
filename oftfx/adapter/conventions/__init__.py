"""Adapter files of other tools: which convention a file has, what it means here, and how to write it."""
