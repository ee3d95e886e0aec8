"""Serving by other engines. Each file needs its engine, and is imported only by it or by `btok`."""
