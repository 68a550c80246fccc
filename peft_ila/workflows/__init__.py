"""Whole workflows as functions, with their files: what the command line calls.

`rank.rank` takes any trainer. What needs TRL is in modules of its own: `sft.rank_by_sft`, `tune.tune`, `demo.demo`.
"""
