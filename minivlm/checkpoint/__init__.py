"""Files to a model and back."""
