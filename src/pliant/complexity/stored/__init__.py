"""The prompts' keys and values, kept between epochs: what they are, where, in what order."""
