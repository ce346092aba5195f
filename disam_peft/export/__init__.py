"""Adapters and merged models as files that work elsewhere, and back."""

from disam_peft.export.adapter_folder import export_peft, load_adapter, save_adapter
from disam_peft.export.merged import export_merged
from disam_peft.export.record import AdapterRecord, read_record

__all__ = ["AdapterRecord", "export_merged", "export_peft", "load_adapter", "read_record", "save_adapter"]
