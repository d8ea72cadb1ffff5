"""Errors of the model package: one hierarchy, one line each - what, where, what to do."""


class ClcrError(Exception):
    """Base of every error raised here for something a person can act on."""


class ConfigError(ClcrError):
    """An option, feature or task declaration that no model can be built from; the message names it."""


class DivergedError(ClcrError):
    """A loss or a gradient is not finite: neither more workers nor another try would help. All workers raise it."""
