"""featserve beside what else one would use, in one run: ``python -m bench.peers`` (``make bench-peers``)."""
