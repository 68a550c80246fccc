"""The values of settings, in a separate module so that the command line need not import torch."""

from typing import Literal

Method = Literal["attribution", "descent", "untrained"]
RecipeFormat = Literal["axolotl", "axolotl-full", "llamafactory", "trl"]
Format = Literal["peft", RecipeFormat]
PruneGranularity = Literal["component", "module", "layer"]
Ranks = Literal["mixed", "uniform"]
