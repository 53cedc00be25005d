"""What is copied beside a served model, as it is; nothing in here imports oftfx or torch."""
