"""Examples, each a script to run or to copy from."""
