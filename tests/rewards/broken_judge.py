"""A judge that cannot be imported."""

raise SystemExit("broken on purpose")
