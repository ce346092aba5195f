"""CoOp: learned context vectors in the text prompt (Zhou et al. 2022, arXiv 2109.01134).

Read ``coop_adapter.py`` first; ``class_chunks.py`` fits the prompts into a memory budget.
"""
