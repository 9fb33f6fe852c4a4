"""The sequence mixers, a file a family; each registers its letters (mambabyte.model.mixer)."""
