"""CLIP models of transformers. ``architectures.py``, the file to read first, says which, and what differs between them.
``clip.py`` implements the contract for all, with ``last_layer.py`` and ``text_tokens.py``. ``checkpoint.py`` says where
a checkpoint comes from, and ``processor.py`` what its image processor does."""
