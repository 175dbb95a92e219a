"""The exceptions that tell a user something; the command line turns each into one sentence and an exit code."""


class InputError(ValueError):
    """Something given to dsconvert cannot be used (exit code 2); the message is one complete sentence for the user."""


class LimitMissed(Exception):
    """A measured value misses the limit that the user set for it (exit code 3); one complete sentence."""
