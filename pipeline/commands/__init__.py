"""The commands, of which `cli.py` makes one program: each parses, calls one function and prints."""
