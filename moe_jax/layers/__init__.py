"""Thin Linen modules: they hold parameters and call the packages below."""
