"""Trained adapters and merged models as files that work elsewhere."""
