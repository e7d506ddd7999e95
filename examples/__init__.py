"""Projects to read and to run."""
