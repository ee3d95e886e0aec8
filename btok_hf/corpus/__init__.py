"""Embed a collection of files or rows, index it, search it, and show it: `btok embed`, `index`, `search` and `app`."""
