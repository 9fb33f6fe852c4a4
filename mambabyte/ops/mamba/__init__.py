"""What a Mamba layer does between its two large projections: in parallel, and one step of it."""
