"""`python -m bench.throughput_generate`: see bench/throughput.py."""

import sys

from bench.throughput import main

if __name__ == "__main__":
    sys.exit(main("generate"))
