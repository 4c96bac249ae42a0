"""What a person can mend: one sentence that names the value, the place, and the way out."""


class InputError(ValueError):
    """Bad input. Scripts print its message alone, without a traceback, and exit with 2."""
