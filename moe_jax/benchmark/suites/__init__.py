"""The suites: NAME.py holds flags and text, NAME_rows.py what is measured.

Only the second imports JAX: so help and errors in flags come at once.
"""
