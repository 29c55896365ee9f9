"""The network: frames, messages, sockets, sessions, and the bandwidth monitor."""
