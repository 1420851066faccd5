"""What calibration and evaluation are asked alike."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


class ReplayError(ValueError):
    """A model, a text or an option that can't be used; the message says what to change."""
