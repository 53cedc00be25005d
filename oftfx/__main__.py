"""``python -m oftfx``."""

from oftfx.cli.main import main

main()
