"""Exports a selection: a LoraConfig, a plain adapter, settings for other programs, frozen layers.

Knows only the names of units and modules, and nothing about rankings, gates or trainers.
"""
