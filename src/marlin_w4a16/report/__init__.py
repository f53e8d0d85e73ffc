"""What is told to people: the report as data, text, a page; graph breaks, progress, what `debug` writes."""
