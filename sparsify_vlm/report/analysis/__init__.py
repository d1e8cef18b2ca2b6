"""Reports of `analyze` and `compare`: figures, wording, HTML and Markdown, from plain data."""
