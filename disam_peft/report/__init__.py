"""Tables, figures and pages, rebuilt from the records of runs at any time. Imports no torch.

Read ``page.py`` first for the report of runs, ``comparison.py`` for the comparison of methods.
"""
