"""The network: frames, messages, sockets, conversations, and the bandwidth monitor."""

import utils  # noqa: F401  # it sets how threads wait, before torch is imported
