"""How the loss of some tokens is computed without the cost of the others.

`split_forward` runs the model's own forward in pieces: the backbone, then the head on some rows.
`two_passes` makes two passes through it, with `layers` between them; `trials` shows on the model at
hand whether these are exact, and which labels its loss means.
"""
