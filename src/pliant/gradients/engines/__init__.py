"""How the loss of some tokens is computed without paying for the others.

`passage` runs the model's own forward in pieces: the backbone, then the head on some rows. `exact`,
`sparse` and `completion` are three ways through it; `keys` and `masks` hold what the second pass of
the latter two needs of the first, and `standing` tries on the model at hand whether they are exact.
"""
