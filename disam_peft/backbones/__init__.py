"""CLIP models of several families behind one contract, in parts that can be frozen or trained.

Read ``base.py`` first (the contract), then ``families.py`` (from a config to a model); each family has a folder.
"""
