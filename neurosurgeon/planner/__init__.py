"""Planning: the candidate cuts of a network, the search for the best one, and the cuts of whole queues.

No torch, no sockets.
"""
