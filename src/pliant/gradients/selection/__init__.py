"""Which tokens of a batch are trained: how hard each is, how many, and which of them."""
