"""Adapters as points on a manifold: half of one, a blend of several, how far apart two are, what a strength keeps."""
