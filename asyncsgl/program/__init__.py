"""Programs: branches, the interpreter, streams and the ``@function`` decorator."""
