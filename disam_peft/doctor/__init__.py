"""Checks that the step keeps its promises on this machine, with this backbone and this adapter.

Read ``examine.py`` first: it runs all checks in order. ``subject.py`` builds what they examine.
"""
