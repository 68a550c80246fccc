"""The scores of all units as a thing of their own: selection, comparison, file, table, picture, card."""
