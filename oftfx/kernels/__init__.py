"""What all of Triton's kernels here need: how they are launched, and whether they are taken at all."""
