"""Rankings of units: selection, comparison, file, table, picture, model card."""
