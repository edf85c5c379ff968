"""Timings, each beside its peer: `python -m bench --help`. One file per op in bench/ops."""
