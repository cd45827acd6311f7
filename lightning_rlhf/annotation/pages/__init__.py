"""Pages of the annotation server, as Jinja templates."""
