"""What is done with a selection: a LoraConfig, a plain adapter, settings of other programs, frozen layers.

Knows units and modules by their names only, and nothing of rankings, gates or trainers.
"""
