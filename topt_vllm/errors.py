"""What the user can mend."""


class UserError(ValueError):
    """Something given that can't be used; the message says what can. Commands show it as one line, status 2."""
