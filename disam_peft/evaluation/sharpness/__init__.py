"""How sharp the loss is around trained weights. ``measures.py`` has the definitions."""
