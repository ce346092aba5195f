"""Does the step do here, on this machine, backbone and adapter, what it promises? ``examine.py`` runs all checks."""
