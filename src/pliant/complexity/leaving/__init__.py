"""How a scorer leaves: the stock model, the proof that it says the same, the card beside it."""
