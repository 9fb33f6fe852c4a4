"""What pages are made of: figures, the ledger, machines, the worked example, names."""
