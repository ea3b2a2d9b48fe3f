"""The report of an evaluation as one HTML or Markdown page."""
