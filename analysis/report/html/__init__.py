"""HTML of the report's parts: text, markdown, tables, figures."""
