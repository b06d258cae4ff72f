"""How much each unit matters: `importance`, by functions in `measures`, some with `meters`."""
