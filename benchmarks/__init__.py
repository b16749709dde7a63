"""Timings and memory of whole processes, side by side on the same files. `make bench` writes docs/performance.md."""
