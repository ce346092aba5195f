"""LoRA and every other method that the peft library attaches to single layers. Start with ``peft_adapter.py``."""
