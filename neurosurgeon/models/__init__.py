"""The networks, the graph that describes one, and where their weights come from."""
