"""Study: SSM, attention and hybrids at equal size and cost."""
