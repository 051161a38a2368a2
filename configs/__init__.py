"""One file per named configuration: a function returning the whole config."""
