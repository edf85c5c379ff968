"""Timings of the ops: `python -m bench --help`."""
