"""One reader for each annotation format; each returns records."""
