"""Training, from one loss to two processes."""
