"""The errors a user can mend."""


class StackError(Exception):
    """Something the user can mend: one line that names the thing, the place and the remedy.

    The command line prints it and exits 1; the library never exits the process.
    """

    def __str__(self) -> str:
        """The line; what it quotes may hold letters that would break it, which are spelled out."""
        text = super().__str__()
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ConfigError(StackError):
    """A config that cannot be: unknown key, wrong type, impossible value, incompatible pair.

    The command line prints it and exits 2.
    """
