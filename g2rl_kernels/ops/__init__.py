"""The public functions and their registration with PyTorch: one schema, one fake and one autograd formula per op."""
