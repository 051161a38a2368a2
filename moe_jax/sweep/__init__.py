"""From a study to its trials on disk: which they are, running them, and what became of them."""
