"""Compares a finished checkpoint with its source, or with its own digests, on a path of its own."""
