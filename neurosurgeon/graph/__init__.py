"""A network as plain data: nodes, layers, tensors and possible cuts. No torch."""
