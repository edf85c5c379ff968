"""`python -m uvg_engine.cli` is `uvg`; torchrun starts it so."""

import sys

from uvg_engine.cli import main

sys.exit(main())
