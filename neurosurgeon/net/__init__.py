"""The network: frames, messages, sockets, conversations, and the bandwidth monitor."""
