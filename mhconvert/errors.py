"""Faults a user can mend. `str(error)` is one line: what is wrong, where, and the way out."""


class MhconvertError(Exception):
    """The base of every fault that the command line prints without a traceback (exit 1)."""


class UnsupportedError(MhconvertError):
    """The donor has a feature that the method cannot carry over."""


class CheckpointError(MhconvertError):
    """A checkpoint cannot be found, read or trusted: missing shard, truncated file, NaN weights."""


class BudgetError(MhconvertError):
    """A KV budget or rank that the donor's geometry cannot express."""


class OutputError(MhconvertError):
    """The output folder exists, or the disk cannot hold it."""


class ReloadKilledError(MhconvertError):
    """The process that reloads the result was killed; what is finished stays for --resume."""


class CalibrationError(MhconvertError):
    """Calibration text that is too short, or settings that no text can satisfy."""


class TextError(MhconvertError):
    """Text that is missing or unreadable."""


class AdapterError(MhconvertError, ValueError):
    """An adapter that cannot be made, loaded or merged. A ValueError too, as peft's own faults are."""


class PublishError(MhconvertError):
    """A push to the Hub that cannot begin, or that the Hub refused; nothing is half published."""


class HealError(MhconvertError):
    """A healing run that cannot begin, or that came to a bad end: settings, text, memory, divergence."""


class RecipeError(MhconvertError):
    """A recipe's file or a part of it that cannot be taken: an unknown key, a wrong type, a value out of range."""


class ExportError(MhconvertError):
    """A checkpoint that another form cannot hold exactly, or that is of the wrong kind for it."""


class ProofError(MhconvertError):
    """An export that does not compute what its checkpoint does."""
