"""Study: accuracy against energy under the public task's rules."""
