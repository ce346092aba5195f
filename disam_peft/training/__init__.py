"""The training loop, ``fit.py``; ``trainer.py`` has one step, in order."""
