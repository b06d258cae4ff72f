"""How a scorer learns: its settings, data set, losses, the module that is trained, its Trainer."""
