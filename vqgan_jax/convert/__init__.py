"""Import and export of the reference's checkpoints: key tables, strict both ways."""
