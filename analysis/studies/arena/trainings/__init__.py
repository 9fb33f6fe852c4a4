"""What is trained, in cells of a sweep: on text, on tasks, with a bounded step size, on pieces."""
