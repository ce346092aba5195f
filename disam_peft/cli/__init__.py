"""The command line. ``app.py`` has the entry point, ``output.py`` the tables that verbs print."""
