"""Whole workflows that read and write files; the command line calls them.

`rank.rank` takes any trainer. These need TRL: `sft.rank_by_sft`, `tune.tune`, `demo.demo`.
"""
