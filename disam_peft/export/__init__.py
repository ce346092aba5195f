"""Trained adapters (``peft.py``), LoRAs made of them (``lora.py``) and merged models (``merged.py``) as files that work
without this package."""
