"""Style sheet, script and icon of the annotation server."""
