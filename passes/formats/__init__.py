"""Weight formats, one file each; see `oftfx.formats` for the protocol they share."""
