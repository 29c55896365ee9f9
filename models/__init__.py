"""The networks, the graph that describes one, and where their weights come from."""

import utils  # noqa: F401  # it sets how threads wait, before torch is imported
