"""Serving by other engines. Each file needs its engine, and is imported only by it or by `btok`."""

KEY = "BTOK_API_KEY"  # of a server and its clients; not a flag, because other users of the machine can see flags
