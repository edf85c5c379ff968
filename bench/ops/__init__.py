"""One file per op, of the op's name: its inputs, its work, and the peers that do the same."""
