"""From images and text to the model's input tensors: one file per concern, one per model's prompt format."""
