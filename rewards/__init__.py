"""Verifiable rewards: plain functions, usable without torch and without the rest of this repository."""
