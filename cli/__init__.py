"""The commands `mamba-ft` and `mamba-study`: options in, one call into the packages, a table out."""
