"""Interleaved timing, the layers that are timed, and the flags and tables that suites share."""
