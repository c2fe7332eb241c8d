"""Data: source -> Images -> split -> batches."""
