"""Where the numbers of training go besides ``metrics.jsonl``: one file per tracker.

Read ``base.py`` first; ``tracking.py`` has the list of them, and what a run calls.
"""
