"""The cloud: conversations with edges, the scheduling of their tasks, and the store of networks and replies."""
