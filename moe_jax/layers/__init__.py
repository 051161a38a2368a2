"""Thin Linen modules: they hold parameters and call the rooms below."""
