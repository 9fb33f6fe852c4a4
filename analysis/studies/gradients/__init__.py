"""Study: whether gradients cross chunk boundaries."""
