"""A CLIP that classifies, and what can be computed from its frozen part alone.

Read ``classifier.py`` first: backbone + adapter + class prompts -> logits.
"""
