"""A run: its files on disk, its output, and how it continues."""
