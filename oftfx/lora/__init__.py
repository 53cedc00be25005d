"""The update of an adapter as a low-rank one, in the files that PEFT and servers read as LoRA."""
