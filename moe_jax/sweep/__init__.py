"""From a study to its trials on disk: their list, their runs, and their outcomes."""
