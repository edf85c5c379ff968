"""Triton kernels, one file per op. Installed as `uvg_engine.kernels`; imported only by `uvg_engine.backends.triton`."""
