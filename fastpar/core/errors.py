"""Every error that a user can cause, so that callers can catch one base class.

Each message names what was wrong and what would be valid; a bare ``assert`` in
fastpar therefore always means a bug in fastpar and never bad input.
"""

from __future__ import annotations


class FastparError(Exception):
    """Base of all errors that fastpar raises on purpose."""


class OptionError(FastparError, ValueError):
    """An unknown option, or a value that the option does not take."""


class TextError(FastparError, ValueError):
    """Text (a plan, a pipeline, a layout) that does not follow the grammar."""


class PlanError(FastparError, ValueError):
    """A plan that is well-formed but cannot run: degrees, mesh or model do not allow it."""


class CaptureError(FastparError, RuntimeError):
    """A graph that fastpar does not take: gradients on, tensors on several devices."""


class CheckError(FastparError, RuntimeError):
    """The structural verifier found a program that breaks its stage's rules (a bug in a pass)."""


class AgreementError(FastparError, RuntimeError):
    """Ranks disagree on the program to run, or one of them failed or did not come."""
