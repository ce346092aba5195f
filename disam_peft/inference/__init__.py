"""A trained classifier at work: classes of new images, in Python and in files."""
