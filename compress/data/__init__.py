"""Calibration and evaluation data: specs, preprocessing, streamed batches, content hashes, splits."""

from compress.data.opening import open_data
from compress.data.preprocessing import Preprocessing
from compress.data.source import Batch, Cast, DataSource, Subset, draw_indices, overlap, split_held_back

__all__ = [
    "Batch",
    "Cast",
    "DataSource",
    "Preprocessing",
    "Subset",
    "draw_indices",
    "open_data",
    "overlap",
    "split_held_back",
]
