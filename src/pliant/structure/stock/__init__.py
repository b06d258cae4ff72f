"""Stock models with fewer units: `smaller` ones, of `configs`, `layouts` and `lazy_state`."""
