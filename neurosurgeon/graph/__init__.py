"""A network as plain numbers: nodes, layers, tensors, and where it can be cut. No torch."""
