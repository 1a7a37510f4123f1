"""Makers: each writes a folder in a public data set's real on-disk format, deterministic from a seed."""
