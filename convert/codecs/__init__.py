"""How tensors are stored: which files' bytes make a tensor, and how they become numbers."""
