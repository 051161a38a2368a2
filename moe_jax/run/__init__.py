"""A run: what it leaves on disk, what it says, and how it goes on."""
