"""What nobody refers to any more, and what should be there and is not: found, and dealt with."""
