"""Data sets: moving handwritten digits, a user's folder of clips, and the export from the first to the second."""

from .digits import DigitAttrs, DigitsDataset, Sample
from .export import export
from .folder import FolderDataset

__all__ = ["DigitAttrs", "DigitsDataset", "FolderDataset", "Sample", "export"]
