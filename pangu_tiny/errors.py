"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake in a file, binding, flag or folder; its text is one line naming what was found
    and what was expected. The command line prints it without a stack trace and exits with 2."""
