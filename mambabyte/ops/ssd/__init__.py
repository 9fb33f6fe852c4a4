"""The scan of Mamba-2 (SSD, a scalar decay a head): its definition and its chunked form."""
