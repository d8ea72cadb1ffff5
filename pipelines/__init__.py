"""The jobs a person submits: one file, one job, one story read from top to bottom."""
