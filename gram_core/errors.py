"""The base of every error that a user can cause and mend: its text is one clear line."""


class GramError(ValueError):
    """Something in the settings, the files or the input is wrong. The message says what, where,
    and what would be right; entry points print it without a traceback."""
