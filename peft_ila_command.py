"""
The program `peft-ila`.

It is beside the package because `import peft_ila` imports PEFT, to register the method, and that takes seconds which
several commands do not need. Where this module was imported first, the package leaves it to the commands.
"""

from peft_ila.cli import main

__all__ = ["main"]
