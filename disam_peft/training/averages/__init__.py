"""Averages of the trained weights over the steps of a run, kept beside the weights themselves.

Read ``base.py`` first (the contract), then ``ema.py``; ``weight_averages.py`` lists all of them.
"""
