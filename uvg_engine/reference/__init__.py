"""The truth of every op: plain PyTorch, any dtype, no tricks."""
