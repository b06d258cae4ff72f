"""Choosing what goes, and letting the rest take over.

`prune` walks through a model, and `pruned` is what it leaves attached. `least_squares` chooses
heads and channels and sets their `compensation`, and `allocation` says how many of each layer go;
`layers` and `close_experts` (by `remaining_experts`) choose the others. `plan` divides a budget
over all parts, by `trials`, their `costs`, and what `mixtures` of parts should lose.
"""
