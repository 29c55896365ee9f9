"""The edge: one task, or a queue of them, planned, run and sent."""
