"""How sharp the loss is around trained weights.

Read ``measures.py`` first, which has the definitions; ``surface.py`` is the loss as a function of the weights.
"""
