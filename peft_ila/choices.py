"""The values that settings choose from; apart, so that the command line names them without importing torch."""

from typing import Literal

Method = Literal["attribution", "descent", "untrained"]
RecipeFormat = Literal["axolotl", "axolotl-full", "llamafactory", "trl"]
Format = Literal["peft", RecipeFormat]
PruneGranularity = Literal["component", "module", "layer"]
Ranks = Literal["mixed", "uniform"]
