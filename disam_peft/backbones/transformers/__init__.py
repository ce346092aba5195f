"""CLIP models of transformers. ``clip.py`` implements the contract for ``CLIPModel``; ``checkpoint.py`` says where a
checkpoint comes from, and ``processor.py`` what its image processor does."""
