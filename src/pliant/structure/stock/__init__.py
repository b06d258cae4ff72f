"""Stock models with fewer units: a `smaller` config, the `layouts` of its tensors, `lazy_state`."""
