"""From cells of columns to tensors of a model, and from its answers back."""
