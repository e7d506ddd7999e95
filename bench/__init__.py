"""Measurements: ``python -m bench`` (``make bench``) prints them; nothing here is a test."""
