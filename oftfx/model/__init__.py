"""What is known of a model as it stands: its sites, names, structure and modes, and what transformers notes on it."""
