"""The HTTP routes, one file per resource. A route reads its input, calls one use-case or store and answers."""
