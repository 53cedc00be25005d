"""Train an adapter from a recipe: data, a loop that goes on where it was stopped, and what it leaves behind."""
