"""Language models that decode with a cache: their graphs, GenAI directories, and greedy decoding in numpy."""
