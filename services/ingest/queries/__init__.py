"""Jobs as clients read and watch them."""
