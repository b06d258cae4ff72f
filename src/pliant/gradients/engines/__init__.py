"""How the loss of some tokens is computed without the cost of the others.

`split_forward` runs the model's own forward in pieces: the backbone, then the head on some rows.
`sparse` and `completion` make two passes through it, with `kv` and `layers` between them;
`exactness` tries on the model at hand whether two passes are exact, `label_alignment` which labels
its loss means.
"""
