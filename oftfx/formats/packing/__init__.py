"""How codes lie in words and bytes, as the packages store them."""
