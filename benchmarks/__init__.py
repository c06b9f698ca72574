"""Programs that measure the package; each is run with `python -m`."""
