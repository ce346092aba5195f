"""One reader per kind of source; all return ``samples.Samples``."""
