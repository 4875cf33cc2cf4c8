"""The page of a study and its figures."""

from .page import write_report

__all__ = ["write_report"]
