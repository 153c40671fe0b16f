"""The commands of `mamba-study`, one a file: options in, one call, a table out."""
