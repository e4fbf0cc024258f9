"""What a user did wrong, as opposed to what we did wrong."""


class UserError(ValueError):
    """A mistake in the input: one sentence saying what is wrong, which value, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class SettingHasNoEffect(UserWarning):
    """A setting was given that changes nothing in this configuration."""
