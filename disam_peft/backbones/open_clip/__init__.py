"""CLIP models of open_clip. ``backbone.py`` implements the contract and runs the text tower, ``image_towers.py`` and
``timm_trunk.py`` run image towers, and ``weights.py`` says where a checkpoint comes from. This folder alone imports
open_clip and timm."""
