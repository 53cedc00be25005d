"""Rotations by Triton's kernels, on CUDA. Nothing here imports Triton before a kernel is asked for."""
