"""The errors a user can mend."""


class StackError(Exception):
    """Something the user can mend: one line that names the thing, the place and the remedy.

    The command line prints it and exits 1; the library never exits the process.
    """


class ConfigError(StackError):
    """A config that cannot be: unknown key, wrong type, impossible value, incompatible pair.

    The command line prints it and exits 2.
    """
