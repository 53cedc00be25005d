"""The command ``oftfx``; one file a command."""
