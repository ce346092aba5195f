"""Whole runs, from data to results, and studies and comparisons, which are many runs.

Read ``run.py`` first: it shows the pipeline in order; ``build.py`` makes the parts that it uses.
"""
