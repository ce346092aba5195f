"""What a classifier is worth: predictions, metrics, rows of results, mistakes and sharpness.

Read ``predict.py`` first, then ``metrics.py`` and ``results.py``.
"""
