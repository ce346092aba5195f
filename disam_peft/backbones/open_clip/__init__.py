"""CLIP models of open_clip. ``backbone.py`` implements the contract; ``weights.py`` says where a checkpoint comes from,
and ``weights_file.py`` what a bare file cannot say. These three alone import open_clip."""
