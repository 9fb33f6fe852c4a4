"""What streams go on by: one interface, and the engines of CPU and GPU behind it."""
