"""The networks, how their graphs are traced, and the sources of their weights."""
