"""CLIP models of open_clip. ``backbone.py`` implements the contract; it and ``weights.py`` alone import open_clip."""
