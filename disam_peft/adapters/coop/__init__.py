"""CoOp: learned context vectors in the text prompt (Zhou et al. 2022, arXiv 2109.01134). Start with ``adapter.py``."""
