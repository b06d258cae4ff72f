"""The prompts' keys and values, stored between epochs: what they are, where, in what order."""
