"""Errors that a user can fix. `str(error)` is one line: what is wrong, where, and what to do."""


class MhconvertError(Exception):
    """Base class of the errors that the command line prints without a traceback, with exit code 1."""


class UnsupportedError(MhconvertError):
    """The donor has a feature that the method cannot convert."""


class CheckpointError(MhconvertError):
    """A checkpoint is missing or damaged: a missing shard, a truncated file, NaN weights."""


class BudgetError(MhconvertError):
    """A KV budget or a rank is impossible with the donor's head shape."""


class OutputError(MhconvertError):
    """An output exists already or cannot be written, or the disk is too small for it."""


class ReloadKilledError(MhconvertError):
    """The process that reloads the result was killed; --resume continues from the finished part."""


class CalibrationError(MhconvertError):
    """The calibration text is too short, or no text can satisfy the settings."""


class TextError(MhconvertError):
    """A text is missing or unreadable."""


class AdapterError(MhconvertError, ValueError):
    """An adapter cannot be created, loaded or merged. Also a ValueError, like the errors of peft."""


class PublishError(MhconvertError):
    """A push to the Hub cannot start or was refused; nothing was published."""


class HealError(MhconvertError):
    """A healing run cannot start or failed: settings, text, memory, divergence."""


class RecipeError(MhconvertError):
    """A recipe is invalid: an unknown key, a wrong type, a value out of range."""


class ExportError(MhconvertError):
    """A checkpoint is of the wrong kind for an export, or the target format cannot represent it exactly."""


class ProofError(MhconvertError):
    """An export and its checkpoint give different outputs."""
