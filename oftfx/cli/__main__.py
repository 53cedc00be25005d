"""``python -m oftfx.cli``."""

from oftfx.cli.main import main

main()
