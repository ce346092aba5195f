"""What a step descends: a loss per sample, its mean, and penalties that are functions of sums over domains.

Read ``base.py`` first: it says what a loss and a penalty are and how one is added; ``objective.py`` has the tables.
"""
