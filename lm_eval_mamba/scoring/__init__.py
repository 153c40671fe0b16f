"""Scoring that reads no prefix twice: requests as a prefix tree, run from forked states.

`tree` arranges the tokens, `schedule` cuts the tree into batches, `runner` runs them, `scorer` puts answers together,
`generation` decodes from shared prompts, `budget` says how much memory all of it may take.
"""
