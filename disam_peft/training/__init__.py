"""The training loop: ``trainer.py`` has the whole step on one screen."""
