"""Benchmarks that were run, and the tables made of them."""
