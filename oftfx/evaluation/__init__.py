"""How good, how alike and how fast: models, files and running servers held against a model in torch."""
