"""The cloud: conversations with edges, the scheduling of their tasks, and what is kept between them."""
