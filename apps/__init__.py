"""The nine applications of the core; each folder is one app, found by its name."""
