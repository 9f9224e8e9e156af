"""Small files, written as a whole and read within bounds. Any room may use them."""
