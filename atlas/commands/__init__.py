"""The commands of `atlas`, one module each; the table of them is in `atlas/cli.py`.

A module has `HELP`, a line about the command; `arguments(parser)`, which adds its arguments; and
`run(args)`, which returns the exit code. What takes long to import is imported in `run`.
"""
