"""What is trained on a frozen CLIP: the contract of every adapter, one file or folder per method, and adapter folders.

Read ``base.py`` first, then ``linear_probe.py``, the smallest adapter; ``registry.py`` lists them all.
"""
