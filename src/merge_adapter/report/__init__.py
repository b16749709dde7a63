"""How a merge is told: terminal, merge_report.json, Markdown, HTML, pictures."""
