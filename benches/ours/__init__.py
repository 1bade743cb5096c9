"""Our side of each row, through the public Python API and nothing else: what a user of the package writes."""
