"""Pages for people, as HTML and Markdown, made from plain data; what they are about they do not know."""
