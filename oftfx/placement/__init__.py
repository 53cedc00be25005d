"""Where a rotation acts: on the input of a layer, on its output, or on its weight. Hooks, so every name stays."""
