"""Training: a recipe, a machine, a loop and its state."""
