"""Data sets: one file per public format, `load(folder) -> {split: rows}`; local files only, nothing is downloaded."""
