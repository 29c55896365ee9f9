"""The decision: candidates of a cut, the search for the best one, and plans of whole queues. No torch, no sockets."""
