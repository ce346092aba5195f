"""Prompts inside the towers. ``image_tokens.py``, the file to read first, puts tokens into blocks of the image tower.
``visual_prompts.py`` trains them alone, ``ivlp.py`` beside prompts of the text tower, and ``maple.py`` as projections
of these; ``text_prompts.py`` is the text side of both."""
