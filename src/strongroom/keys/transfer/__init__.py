"""Import and export of keys: key files of other systems, and files of whole key records."""

from .key_file import Finding, KeyFileError
from .key_file_chunks import KeyPieces, survey
from .key_file_export import Exported, export_rows, file_of
from .key_file_import import Checksums, KeyImport, Plan
from .record_file import Record, RecordReader
from .record_import import ExportedRecords, PlannedRecord, RecordImport, export_records

__all__ = [
    "Checksums",
    "Exported",
    "ExportedRecords",
    "Finding",
    "KeyFileError",
    "KeyImport",
    "KeyPieces",
    "Plan",
    "PlannedRecord",
    "Record",
    "RecordImport",
    "RecordReader",
    "export_records",
    "export_rows",
    "file_of",
    "survey",
]
