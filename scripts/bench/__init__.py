"""The measurements behind ``scripts/benchmark.py``, one file per section of its table."""
