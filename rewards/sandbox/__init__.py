"""Engines that run what a model wrote, each with a list of what it does and does not cover."""
