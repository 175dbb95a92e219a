"""The one exception a user's mistake raises; the command line turns it into one sentence and exit code 2."""


class InputError(ValueError):
    """Something given to dsconvert cannot be used; the message is one complete sentence for the user."""
