"""Choosing what goes, and letting the rest take over.

`prune` walks through a model: `least_squares` chooses heads and channels and gives `compensation`
its weights, `layers` and `close_experts` (by `remaining_experts`) choose the others. `plan` divides
a budget over all parts, by `trials` and their `costs`.
"""
