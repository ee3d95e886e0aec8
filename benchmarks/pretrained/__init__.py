"""A pretrained base from the package registry, and what Bottleneck Tokens are worth on it."""
