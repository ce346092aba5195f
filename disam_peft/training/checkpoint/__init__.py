"""Checkpoints that are complete or absent, and orderly ends after a signal. Start with ``manager.py``."""
