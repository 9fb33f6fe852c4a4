"""Study: which statements of the two documents hold."""
