"""What runs at the [CPX] positions: the rows, their LoRA, how they start and are read."""
