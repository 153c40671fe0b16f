"""From results to a report: `document` says what one consists of, `charts` draws, `markdown` and `html` write."""
