"""Plans and folds as tables, JSON and HTML."""
