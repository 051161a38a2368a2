"""Runs: what they leave on disk, resuming, packs, several processes."""
