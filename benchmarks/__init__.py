"""Benchmarks beside a bare floor and a peer, measured in one run: `python -m benchmarks` (or `make bench`)."""
