"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """Bad input: one line that says what was got, what was expected and what to do.

    The command line prints the message alone and exits with status 2; everything else is a
    defect and keeps its traceback. Not a ValueError, which the option parser would catch and
    rephrase.
    """
