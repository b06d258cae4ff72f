"""The interface of code that was written before: the seed's names, with its parameters."""
