"""The command line: one file per group of verbs, each verb only as long as reading its options and printing its result.

Read ``app.py`` first: it lists the verbs and has the entry point. ``output.py`` has all tables that they print.
"""
