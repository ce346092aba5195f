"""Whole runs: ``run.py`` shows the pipeline in order, from data to results; studies and comparisons are many runs."""
