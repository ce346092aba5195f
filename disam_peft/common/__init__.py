"""What several floors need: files, locks, processes, random numbers, devices, progress bars and records.

Each module is the only home of its subject. Read ``files.py`` and ``processes.py`` first.
"""
