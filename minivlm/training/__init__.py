"""Fine-tuning: low-rank adapters, labels, the loop."""
