"""Image editing and super-resolution with flow policies; see app.py."""
