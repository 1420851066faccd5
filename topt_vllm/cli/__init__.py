"""The command ``topt-vllm``."""


class UserError(Exception):
    """Something the user can mend: shown as one line, exit status 2."""
