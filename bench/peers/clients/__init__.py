"""The clients, each a process in the environment of what it asks: they import its packages, NumPy, and ``driver``."""
