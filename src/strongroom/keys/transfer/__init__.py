"""Import and export of keys: key files of other systems, and files of whole key records."""

from .import_plan import Checksums, Plan
from .key_file import Finding, KeyFileError
from .key_file_chunks import ChunkedKeyFile, survey
from .key_file_export import Exported, export_rows, file_of
from .key_file_import import KeyImport
from .record_export import ExportedRecords, export_records
from .record_file import Record, RecordReader
from .record_import import PlannedRecord, RecordImport

__all__ = [
    "Checksums",
    "ChunkedKeyFile",
    "Exported",
    "ExportedRecords",
    "Finding",
    "KeyFileError",
    "KeyImport",
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
