"""Tests of the computation of a training step."""
