"""What several floors need, once: files, locks, processes, random numbers, devices, progress bars and records."""
