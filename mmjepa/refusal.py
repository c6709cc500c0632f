"""The coded "no": what mmjepa raises when an input cannot be used."""


class Refusal(Exception):
    """Bad input, said in one line: which thing, what is wrong, what to do.

    code: short stable name such as ``CT_NO_RESCALE`` (upper case, counted in manifests and tested).
    message: what was found; names a path as the user typed it, a row number or a salted hash, never an identifier.
    hint: what to do about it.

    The command line prints it without a traceback and exits with 2.
    """

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(code, message, hint)
        self.code, self.message, self.hint = code, message, hint

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" + (f". {self.hint}" if self.hint else "")
