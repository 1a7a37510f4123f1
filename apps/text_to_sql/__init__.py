"""Text-to-SQL with execution rewards: see README.md in this folder."""
