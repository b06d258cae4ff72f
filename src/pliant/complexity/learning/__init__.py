"""What a training is made of: settings, lessons, losses, the module that is trained, its report."""
