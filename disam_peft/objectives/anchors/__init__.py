"""Anchors: distances that hold a model near zero-shot CLIP, or near where it started.

Read ``base.py`` first: it says what an anchor is and how one is added; ``ANCHORS`` in ``objectives/objective.py`` is
the table.
"""
