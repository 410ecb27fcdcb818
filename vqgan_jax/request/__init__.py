"""What a sampling job is asked for: conditions and given parts, from data sets and files, and its sheet."""
