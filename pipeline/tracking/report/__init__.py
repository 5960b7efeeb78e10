"""The comparison as one web page; it holds its data, style and script, and loads nothing."""
