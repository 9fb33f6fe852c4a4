"""Study: where each form of the scan goes wrong."""
