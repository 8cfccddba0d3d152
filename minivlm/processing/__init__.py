"""From images and text to the tensors that a model takes: one file per concern, one per model's prompt format."""
