"""Which samples make up the batch of a step, and how they reach the device. Start with ``sampler.py``."""
