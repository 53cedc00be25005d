"""Named sets of rotations: kept in a model, switched, saved and loaded."""
