"""`python -m peft_ila` is `peft-ila`."""

from .cli import main

main()
