"""Trained adapters (``peft.py``) and merged models (``merged.py``) as files that work without this package."""
