"""One file a claim: each measures it beside its controls, in one run, and keeps the JSON."""
