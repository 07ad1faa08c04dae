"""Rows out of files, one by one: JSON Lines, JSON, CSV, Parquet, plain text; what is broken is named or repaired."""

from pronghorn.data.reading.files import Record, RowFile
from pronghorn.data.reading.parse import parse
from pronghorn.data.reading.problems import KINDS, Finding, Kind, Level, Problem, level_of
from pronghorn.data.reading.readable import readable_rows

__all__ = [
    "KINDS",
    "Finding",
    "Kind",
    "Level",
    "Problem",
    "Record",
    "RowFile",
    "level_of",
    "parse",
    "readable_rows",
]
