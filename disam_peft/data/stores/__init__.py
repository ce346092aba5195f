"""Files that keep what is expensive to compute again: decoded pixels, and outputs of the frozen part of a model."""
