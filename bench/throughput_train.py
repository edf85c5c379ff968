"""`python -m bench.throughput_train`: see bench/throughput.py."""

import sys

from bench.throughput import main

if __name__ == "__main__":
    sys.exit(main("train"))
