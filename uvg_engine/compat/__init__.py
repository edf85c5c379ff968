"""Other libraries' calls on our ops: the same names and signatures, so that existing code changes one import."""
