"""The seed's names for experts, thin over the core."""
