"""The class features of an adapter that trains the text side, as a file for use without this package."""

from __future__ import annotations

import json

from safetensors.torch import save as save_tensors
from torch import Tensor

CLASS_FEATURES_NAME = "class_features.safetensors"


def class_features_file(class_names: tuple[str, ...], class_features_CE: Tensor) -> dict[str, bytes]:
    """Name and content of the file: the class features (C, E), which are all that classification needs beside the image
    tower. The class names stand in its metadata."""
    metadata = {"format": "pt", "classes": json.dumps(list(class_names), ensure_ascii=False)}
    return {CLASS_FEATURES_NAME: save_tensors({"class_features": class_features_CE}, metadata=metadata)}
