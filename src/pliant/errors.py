"""What can go wrong. Each error says what happened, with which value, and what to do about it."""

from __future__ import annotations


class PliantError(Exception):
    """The root of what a user can cause or mend: on the command line one line, exit code 2."""


class UnsupportedModel(PliantError):
    """The model's structure was not found: says what was looked for, and how to name it by hand."""


class ModelNotFound(PliantError):
    """A name that is no embedded model, no local folder and none on the hub, or a broken one."""


class InvalidInput(PliantError, ValueError):
    """A value that cannot be used: says which one, and what would be accepted."""


class AdapterError(PliantError):
    """An adapter cannot be attached, saved or loaded; the model is as it was before."""


class CorruptFile(AdapterError):
    """A saved file is truncated, foreign, of a later version, or lacks what its index promises."""


class WrongBase(AdapterError):
    """An adapter was trained on another base model than the one it is being put on."""
