"""The seeds' interface: a tokenizer that ends in [CPX]; a base with its scorer in one module."""
