"""CLIP models of transformers. ``clip.py`` implements the contract for ``CLIPModel``."""
